"""The stream that every source of dated facts stands on: the certain changes in their real order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from streams import transforms
from streams.base import BadStream, StreamConfig, TrainPool
from streams.dated.states import DatedChange, SourceData, certain_changes
from streams.files.entry import EntryData, EntryQuestion, FactEntry, QuestionCollector, drawn_role, question_key, rotated
from streams.files.entry_stream import EntryStream
from streams.files.records import reasons
from streams.transforms import hash_fraction
from testbed.core.events import EditEvent, Split, content_id


class DatedStream(EntryStream):
    """Real changes, old value to new, ordered by date. A subclass gives `readers`.

    The first change of a fact is its `add`, each later one a `revise`. `seed` orders changes of the same date;
    the shares of kinds, `edits_per_year` and `drift` have no effect. 15 % of the facts, by a hash of their names,
    are never edited: their value before their first change must stay.
    """

    time_axis = "dated"
    supports = frozenset({"since", "wrong"})

    readers: ClassVar[tuple[Callable[[Path | None, SourceData], None], ...]]
    """Each adds the facts of one source under a data root. Raises `BadStream`."""

    def timelines(self, config: StreamConfig) -> SourceData:
        """The facts under `config.data_root`. Raises `BadStream`."""
        data = SourceData()
        for reader in self.readers:
            reader(config.data_root, data)
        return data

    def read(self, config: StreamConfig) -> EntryData:
        source = self.timelines(config)
        self._total, self._unchanged, self._earlier = source.total, 0, 0
        self._changes: dict[str, list[DatedChange]] = {}
        entries = tuple(self._changing(source))
        if not entries:
            what = f"none of {source.total:,} records makes a change{self._since}"
            raise BadStream(f"{self.name}: {what} ({reasons(source.skipped) or 'no records'}).")
        return EntryData(self.summary.split(":")[0], entries, tuple(source.skipped), content_id(source.digests))

    def _changing(self, source: SourceData) -> Iterator[FactEntry]:
        """Facts with at least one certain change; of two facts with one name or question the first is kept."""
        seen: set[object] = set()
        for t in source.timelines:
            keys = {t.name, question_key(t.image, t.prompt)}
            if keys & seen:
                source.skip(t.name, "the same question stands earlier")
                continue
            seen |= keys
            found = certain_changes(t, source.skipped)
            late = [c for c in found if c.time >= self.config.since]
            self._unchanged += not found
            self._earlier += len(found) - len(late)
            if late:
                self._changes[t.name] = late
                yield FactEntry(
                    source=t.name,
                    prompt=t.prompt,
                    target=late[0].target,
                    previous=late[0].previous,
                    subject=t.subject,
                    relation=t.relation,
                    image=t.image,
                    held_out=t.held_out,
                    train=t.train,
                    questions=(EntryQuestion("portability", t.prompt_by_name),) if t.prompt_by_name else (),
                    role=drawn_role("dated control", t.name),
                )

    @property
    def _since(self) -> str:
        return f" from {self.config.since} on" if self.config.since else ""

    @property
    def origin(self) -> str:
        changes, facts = sum(map(len, self._changes.values())), len(self._data.entries)
        controls = facts - len(self._edited)
        return f"{self._data.origin}, {changes:,} dated changes{self._since} of {facts:,} facts, {controls:,} of these never edited"

    def counts(self) -> dict[str, Any]:
        return {
            "records": self._total,
            "facts_without_a_certain_change": self._unchanged,
            "changes_before": self._earlier,
            "edits_by_year": dict(Counter(str(event.year) for event, _ in self._dated.values())),
        }

    @cached_property
    def _dated(self) -> dict[str, tuple[EditEvent, DatedChange]]:
        """Every event with its change, by the event's id, in order."""
        tie = {e.source: hash_fraction("tie", self.config.seed, e.source) for e in self._edited}
        pairs = [(e, i, c) for e in self._edited for i, c in enumerate(self._changes[e.source])]
        pairs.sort(key=lambda p: (p[2].time, tie[p[0].source], p[1]))
        steps = (transforms.FactChange("revise" if i else "add", e, c.target, c.previous) for e, i, c in pairs)
        events = transforms.dated(steps, (c.time for _, _, c in pairs))
        return {event.id: (event, c) for event, (_, _, c) in zip(events, pairs)}

    def events(self, n: int) -> list[EditEvent]:
        return [event for event, _ in self._dated.values()][: max(n, 0)]

    def _entry_of(self, event: EditEvent) -> FactEntry:
        if event.id not in self._dated:
            raise self.foreign_event(event)
        return super()._entry_of(event)

    def aliases_of(self, entry: FactEntry, event: EditEvent, value: str) -> tuple[str, ...]:
        """Other values of the fact that hold at the time of the change."""
        return self._dated[event.id][1].aliases

    def _add_locality(self, collector: QuestionCollector, entry: FactEntry, own: list[EntryQuestion]) -> None:
        """Add one control each: the same relation of another subject; another relation; another relation of the same subject."""
        order = rotated(self._controls, "control of", entry.source)[:400]
        fits = [c for c in order if collector.reveals_leak(c.previous)]
        same = next((c for c in fits if c.relation == entry.relation), None)
        other = next((c for c in fits if c.relation != entry.relation and c.subject != entry.subject), None)
        sibling = next((c for c in self._controls if c.subject == entry.subject and collector.reveals_leak(c.previous)), None)
        found: list[tuple[FactEntry | None, Split]] = [(same, "locality_hard"), (other, "locality_far"), (sibling, "locality_sibling")]
        for control, split in found:
            if control is not None:
                collector.add_unreserved(control.as_control(split))

    def probe_prompts(self, entry: FactEntry) -> tuple[str, ...]:
        """Also the edit's own prompt, unless it needs its picture."""
        return (*entry.held_out, *([q.prompt for q in entry.questions] or [entry.prompt]))

    def train_pool(self) -> TrainPool:
        return TrainPool(tuple(e.as_belief(e.prompt, "train pool") for e in self._data.entries if e.role == "train"))
