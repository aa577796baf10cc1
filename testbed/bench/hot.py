"""Each stage of an edit and of a question, beside the floor of its matrix products on this machine."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from streams.base import Stream
from testbed.bench.editors import Amount, asked, stages_of
from testbed.bench.floor import Machine, Work, products
from testbed.core.events import EditBatch, EditEvent
from testbed.core.timing import collect_seconds
from testbed.editors.base import Editor
from testbed.model.handle import ModelHandle


@dataclass(frozen=True)
class HotPath:
    """Wall time of one stage, an edit or a question, in a steady state: what is found out once a model has been found out."""

    model: str
    editor: str
    path: str
    """What of: `edit` and `question` are the whole, `edit: train` is a stage, `question: other` is what no stage names."""
    milliseconds: float
    floor_milliseconds: float
    """The least that its matrix products take: operations or bytes from memory, whichever takes longer, product by product."""
    billions_of_operations: float
    megabytes: float
    """What its products fetch from memory, past the last-level cache."""

    @property
    def times_floor(self) -> float | None:
        return self.milliseconds / self.floor_milliseconds if self.floor_milliseconds else None


def hot_paths(handle: ModelHandle, stream: Stream, make: Callable[[], Editor], amount: Amount, machine: Machine) -> list[HotPath]:
    """One editor on one model. The same edits and questions are made twice: timed, and with their products counted."""
    editor = make()
    editor.prepare(handle, stream.train_pool())
    first, *events = stream.events(amount.edits + 1)
    before = editor.state_dict()
    _made(editor, stream, [first], 1)
    cache = {k: copy.copy(v) for k, v in handle.cache.items()}

    def begin() -> None:
        """As it was after the first edit, with what that found out, and nothing kept of the edits behind it."""
        editor.load_state_dict(before)
        handle.cache.clear()
        handle.cache.update({k: copy.copy(v) for k, v in cache.items()})
        _made(editor, stream, [first], 1)

    begin()
    seconds = _made(editor, stream, events, 2)
    begin()
    with products(machine) as work:
        _made(editor, stream, events, 2)
    out = list(_lines(handle, editor, "edit", len(events), seconds, work))
    asks, answers = asked(handle, stream, events, amount.questions)
    respond = lambda: editor.predictor().respond(asks, answers, 16)  # noqa: E731
    respond()
    seconds = _heard(respond)
    with products(machine) as work:
        _heard(respond)
    return out + list(_lines(handle, editor, "question", len(asks), seconds, work))


def _made(editor: Editor, stream: Stream, events: Sequence[EditEvent], step: int) -> Mapping[str, float]:
    """Make edits one at a time; seconds by stage, and of all under ""."""
    total = Counter[str]()
    for i, e in enumerate(events, step):
        start = time.perf_counter()
        report = editor.apply(EditBatch((e,), i, {e.id: stream.paraphrases(e)}))
        total.update(stages_of(report) | {"": time.perf_counter() - start})
    return total


def _heard(work: Callable[[], object]) -> Mapping[str, float]:
    start = time.perf_counter()
    with collect_seconds() as seconds:
        work()
    return {"": time.perf_counter() - start, **seconds}


def _lines(
    handle: ModelHandle, editor: Editor, unit: str, n: int, seconds: Mapping[str, float], work: Mapping[str, Work]
) -> Iterator[HotPath]:
    """The whole, its stages, and what no stage names; nothing where nothing was done."""
    if not n:
        return
    every = Work(*(sum(getattr(w, name) for w in work.values()) for name in ("operations", "bytes", "seconds")))
    named = {k: v for k, v in seconds.items() if k}
    parts = {unit: (seconds[""], every), **{f"{unit}: {k}": (v, work.get(k, Work())) for k, v in named.items()}}
    parts[f"{unit}: other"] = (seconds[""] - sum(named.values()), work.get("", Work()))
    for path, (took, w) in parts.items():
        yield HotPath(handle.name, editor.name, path, 1e3 * took / n, 1e3 * w.seconds / n, w.operations / n / 1e9, w.bytes / n / 1e6)
