"""The stream that every source of dated facts stands on: the certain changes in their real order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from streams.base import BadStream, StreamConfig, TrainPool
from streams.dated.states import DatedChange, SourceData, certain_changes
from streams.files.entry import EntryData, EntryQuestion, FactEntry, QuestionCollector, drawn_role, question_key, rotated
from streams.files.entry_stream import EntryStream
from streams.files.records import reasons
from testbed.core.events import content_id


class DatedStream(EntryStream):
    """Real changes, old value to new, ordered by date. A subclass gives `readers`.

    The value of a control, which is never edited, before its first change must stay.
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
        changes: dict[str, list[DatedChange]] = {}
        entries = tuple(self._changing(source, changes))
        if not entries:
            since = f" from {config.since} on" if config.since else ""
            what = f"none of {source.total:,} records makes a change{since}"
            raise BadStream(f"{self.name}: {what} ({reasons(source.skipped) or 'no records'}).")
        return EntryData(self.summary.split(":")[0], entries, tuple(source.skipped), content_id(source.digests), changes=changes)

    def _changing(self, source: SourceData, changes: dict[str, list[DatedChange]]) -> Iterator[FactEntry]:
        """Facts with at least one certain change, written to `changes`; of two facts with one name or question the first."""
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
                changes[t.name] = late
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

    def counts(self) -> dict[str, Any]:
        return super().counts() | {
            "records": self._total,
            "facts_without_a_certain_change": self._unchanged,
            "changes_before": self._earlier,
        }

    def _add_locality(self, collector: QuestionCollector, entry: FactEntry, own: list[EntryQuestion]) -> None:
        self.add_controls(collector, entry, rotated(self._controls, "control of", entry.source)[:400])

    def probe_prompts(self, entry: FactEntry) -> tuple[str, ...]:
        """Also the edit's own prompt, unless it needs its picture."""
        return (*entry.held_out, *([q.prompt for q in entry.questions] or [entry.prompt]))

    def train_pool(self) -> TrainPool:
        pool = tuple(e.as_belief(e.prompt, "train pool") for e in self._data.entries if e.role == "train")
        return TrainPool(pool, find_edits=self._train_edits)
