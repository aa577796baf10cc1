"""`merged:A+B`: several streams as one, their edits in one order of time.

    --stream merged:okedit-yearly+world-yearly --data-root DIR
    --stream merged:templama@templama+leaders@reign --data-root DIR

A name with `@FOLDER` reads that folder under the data root.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from streams import transforms
from streams.base import BadStream, Skipped, Stream, StreamConfig, TimeAxis, TrainEdit, TrainPool
from streams.files.entry import QuestionKey, content_key
from testbed.core.events import LOCALITY_SPLITS, EditEvent, Question, content_id
from testbed.core.registry import STREAMS

ALL = 10**6
"""More events than any finite stream has."""


@STREAMS.register("merged:")
class Merged(Stream):
    """Several streams as one. Dated streams are merged by their dates; other streams alternate by their drawn times, and
    the years of the merged stream are drawn anew.

    Where two streams edit one question (picture and prompt), only the earlier-named stream keeps it, and no stream
    asks a locality question that another one edits. Raises `BadStream` for streams that have no common time.
    """

    summary = "Several streams in one order of time: merged:A+B, each as NAME or NAME@FOLDER under --data-root"
    time_axis = "scheduled"
    supports = frozenset({"records", "since"})
    licence = "those of its streams"
    size = "as its streams"
    argument: ClassVar[str] = ""

    def __init__(self, config: StreamConfig) -> None:
        super().__init__(config)
        names = self.argument.split("+") if self.argument else []
        if len(names) < 2 or len(set(names)) < len(names) or not all(names):
            raise BadStream(f"this stream needs its source in its name: merged:A+B, with two streams or more; got {self.argument!r}")
        self.parts = [_part(name, replace(config, bursts=0.0)) for name in names]
        self.time_axis = self._common_axis()
        self.skipped = [Skipped(f"{p.name}: {s.where}", s.reason) for p in self.parts for s in p.skipped]
        self._finite = [None if p.time_axis == "simulated" else p.events(ALL) for p in self.parts]
        self._edited_keys = [{content_key(e) for e in events or ()} for events in self._finite]
        self._all_edited: set[QuestionKey] = set().union(*self._edited_keys)
        self.skipped += self._repeated()
        self._part_index: dict[str, int] = {}

    def _common_axis(self) -> TimeAxis:
        axes = [p.time_axis for p in self.parts]
        found = ", ".join(f"{p.name} is {p.time_axis}" for p in self.parts)
        if "dated" in axes and len(set(axes)) > 1:
            raise BadStream(f"{self.name}: real dates and drawn years have no common time ({found}): merge streams of one kind")
        if axes.count("simulated") > 1:
            raise BadStream(f"{self.name}: several streams would edit one simulated world ({found}): give --data-root for all but one")
        return self.parts[0].time_axis if len(set(axes)) == 1 else "scheduled"

    def _repeated(self) -> list[Skipped]:
        out = []
        for i, part in enumerate(self.parts):
            shared = set().union(*self._edited_keys[:i]) & self._edited_keys[i]
            out += [Skipped(f"{part.name}: {prompt}", "an earlier stream edits the same question") for _, prompt in sorted(shared)]
        return out

    @property
    def origin(self) -> str:
        return " and ".join(p.origin for p in self.parts)

    def data_hash(self) -> str:
        return content_id([p.data_hash() for p in self.parts])

    def counts(self) -> dict[str, Any]:
        return {"merged": {p.name: p.manifest() for p in self.parts}}

    def notes(self, events: Sequence[EditEvent]) -> list[str]:
        own = [[e for e in events if self._part_of(e) == i] for i in range(len(self.parts))]
        return [f"{p.name}: {note}" for p, given in zip(self.parts, own) for note in p.notes(given)]

    def events(self, n: int) -> list[EditEvent]:
        given = [p.events(max(n, 0)) if events is None else events for p, events in zip(self.parts, self._finite)]
        own = [[(e, i) for e in events if self._is_free(e, i)] for i, events in enumerate(given)]
        inorder = list(islice(heapq.merge(*own, key=lambda pair: pair[0].time), max(n, 0)))
        self._part_index |= {e.id: i for e, i in inorder}
        c = self.config
        drawn = transforms.calendar(c.edits_per_year, c.bursts, transforms.generator(c.seed, "years"))
        times = (e.time for e, _ in inorder) if self.time_axis == "dated" else drawn
        return [replace(e, seq=seq, time=t) for seq, ((e, _), t) in enumerate(zip(inorder, times))]

    def _is_free(self, event: EditEvent, i: int) -> bool:
        return not any(content_key(event) in taken for taken in self._edited_keys[:i])

    def questions(self, event: EditEvent) -> tuple[Question, ...]:
        return tuple(q for q in self.parts[self._part_of(event)].questions(event) if self._may_ask(q))

    def _may_ask(self, q: Question) -> bool:
        """Whether no part trains on the question, nor edits it where it is a locality question."""
        if q.split in ("edit", "stale"):
            return True
        key = content_key(q)
        return key not in self._pool and (q.split not in LOCALITY_SPLITS or key not in self._all_edited)

    def _part_of(self, event: EditEvent) -> int:
        if event.id not in self._part_index:
            self.events(event.seq + 1)
        if event.id not in self._part_index:
            raise self.foreign_event(event)
        return self._part_index[event.id]

    def general(self) -> tuple[Question, ...]:
        kept = self._all_edited | self._pool.keys()
        return tuple({q.id: q for p in self.parts for q in p.general() if content_key(q) not in kept}.values())

    def paraphrases(self, event: EditEvent) -> tuple[str, ...]:
        return self.parts[self._part_of(event)].paraphrases(event)

    def train_pool(self) -> TrainPool:
        """The train pools of all parts, without the questions that another part edits."""
        pools = [p.train_pool() for p in self.parts]
        texts = dict.fromkeys(t for pool in pools for t in pool.texts)
        return TrainPool(tuple(self._pool.values()), tuple(texts), lambda: tuple(e for p in pools for e in p.edits if self._may_train(e)))

    def _may_train(self, edit: TrainEdit) -> bool:
        """Whether no part edits or asks in general any of its questions, nor edits its subject."""
        return edit.event.subject not in self._edited_subjects and not any(content_key(a) in self._in_use for a in edit.asks())

    @cached_property
    def _edited_subjects(self) -> set[str]:
        return {e.subject for events in self._finite for e in events or () if e.subject}

    @cached_property
    def _in_use(self) -> set[QuestionKey]:
        """What parts edit, and what they ask in general."""
        return self._all_edited | {content_key(q) for p in self.parts for q in p.general()}

    @cached_property
    def _pool(self) -> dict[QuestionKey, Question]:
        found = {content_key(q): q for p in self.parts for q in p.train_pool().questions}
        return {key: q for key, q in found.items() if key not in self._all_edited}

    def beliefs(self) -> Iterator[Question]:
        """The beliefs of all parts; where two parts have one about the same question, the earlier part's."""
        given: set[QuestionKey] = set()
        for part in self.parts:
            found = [q for q in part.beliefs() if content_key(q) not in given]
            given |= {content_key(q) for q in found}
            yield from found


def _part(name: str, config: StreamConfig) -> Stream:
    name, _, folder = name.partition("@")
    root = Path(config.data_root or ".") / folder if folder else config.data_root
    return STREAMS.get(name)(replace(config, data_root=root))
