"""What an editor did and answered under Avalanche, kept as a run folder: an experience is a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from testbed.core.events import LOCALITY_SPLITS, EditEvent, content_id
from testbed.core.schema import SCHEMA_VERSION, BaseAnswer, EditReport, EventRow, QuestionRow, Record
from testbed.editors.base import Editor
from testbed.experiment.answering import Answer
from testbed.experiment.config import plain
from testbed.experiment.schedule import Schedule, ScheduledQuestion, Step
from testbed.integrations.avalanche.benchmark import Item
from testbed.model.handle import ModelHandle
from testbed.probes.base import Applied, Checkpoint, Planned
from testbed.storage.files import StoreError, write_rows
from testbed.storage.run_folder import RunFolder, StepResults

_AFTER = ("right_after", "immediate")
"""Probe and panel of an answer right after its edit's experience, as the testbed's own runs name them."""
_PANEL = ("avalanche", "stream")


@dataclass(frozen=True)
class Answered:
    item: Item
    answer: Answer


class Ledger:
    """Records, reports and the texts behind them, since the start or the last `resume`."""

    def __init__(self, editor: Editor, handle: ModelHandle) -> None:
        self.editor, self.handle = editor, handle
        self.step, self.time = 0, 0.0
        self.fresh: list[tuple[list[Record], EditReport]] = []
        self.events: dict[str, dict[str, Any]] = {}
        self.questions: dict[str, dict[str, Any]] = {}
        self.base: dict[str, BaseAnswer] = {}
        self.run = content_id("avalanche", editor.name, plain(editor.config), editor.seed, handle.hash)

    def trained(self, edits: Sequence[EditEvent], report: EditReport) -> None:
        """An experience is done: everything asked from now on is asked after it."""
        self.step, self.time = self.step + 1, edits[-1].time
        for e in edits:
            if e.revises in self.events:
                self.events[e.revises]["superseded_step"] = self.step
        applied = tuple(Applied(e, self.step, len(self.events) + i + 1) for i, e in enumerate(edits))
        self.events |= {row.edit_id: _row(row) for row in self._as_schedule(applied, ()).event_rows()}
        self.fresh.append(([], replace(report, step=self.step)))

    def asked(self, answered: Sequence[Answered]) -> None:
        """Keep answers; those given before any edit are the unedited model's."""
        plans = tuple(ScheduledQuestion(Planned(a.item.question, _PANEL[1], None, 1.0), _PANEL[0], 1) for a in answered)
        self.questions |= {row.question_id: _row(row) for row in self._as_schedule((), plans).question_rows()}
        for a in answered:
            if self.step == 0:
                self.base[a.item.question.id] = _base(a)
            else:
                self._record(a)

    def _as_schedule(self, edits: tuple[Applied, ...], asked: tuple[ScheduledQuestion, ...]) -> Schedule:
        """The step at hand, so that its rows are made where all runs make them."""
        return Schedule((Step(Checkpoint(self.step, len(self.events), self.time, frozenset(), len(self.events) - len(edits)), edits, asked),))

    def _record(self, a: Answered) -> None:
        made = self.events.get(a.item.question.event_id or "", {}).get("step")
        records = self.fresh[-1][0]
        records.append(self._as_record(a, made, *_PANEL))
        if made == self.step and a.item.question.split == "edit":
            records.append(self._as_record(a, made, *_AFTER))

    def _as_record(self, a: Answered, made: int | None, probe: str, panel: str) -> Record:
        q, answer = a.item.question, a.answer
        event = self.events.get(q.event_id or "", {})
        base = self.base.get(q.id)
        local = q.split in LOCALITY_SPLITS
        return Record(
            run=self.run,
            editor=self.editor.name,
            seed=self.editor.seed,
            edit_id=q.event_id,
            edit_step=made,
            edit_time=event.get("time"),
            probe_step=self.step,
            probe_time=self.time,
            probe=probe,
            probe_version=1,
            split=q.split,
            topic=q.topic or event.get("relation") or "",
            question_id=q.id,
            answer=a.item.reference,
            target=event.get("target"),
            base_answer=a.item.reference if local else (base.generated if base else None) or "",
            token_hits=answer.token_hits,
            n_tokens=answer.n_tokens,
            logprob=answer.logprob,
            generated=answer.generated,
            exact=answer.exact,
            panel=panel,
            incl_prob=1.0,
            seconds=0.0,
            extras=answer.extras,
        )

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Add what is new since the last save, and the state. Raises `StoreError` for a folder that holds another run."""
        if not self.step:
            raise StoreError("nothing was trained yet, so there is nothing to save")
        out = RunFolder(folder)
        if not (folder / "manifest.json").exists():
            out.create(self._manifest())
        elif out.manifest().get("run") != self.run:
            raise StoreError(f"{folder} holds the run of another editor, configuration or model: choose another folder")
        write_rows(folder / "events.parquet", EventRow, self.events.values())
        write_rows(folder / "questions.parquet", QuestionRow, self.questions.values())
        out.write_base_answers(self.base.values())
        records = [r for part, _ in self.fresh for r in part]
        found = StepResults(records, reports=[report for _, report in self.fresh])
        out.editor(self.editor.name).save(self.step, found, state)
        self.fresh = []

    def resume(self, folder: Path) -> tuple[int, dict[str, Any]]:
        """The number of experiences that are done, and the state after them. Raises `StoreError`."""
        out = RunFolder(folder)
        if out.manifest().get("run") != self.run:
            raise StoreError(f"{folder} holds the run of another editor, configuration or model; it cannot go on with this one")
        self.step, state = out.editor(self.editor.name).resume()
        if state is None:
            raise StoreError(f"{folder} holds no readable state of {self.editor.name}: start anew")
        self.events = {r["edit_id"]: r for r in _rows(folder / "events.parquet")}
        self.questions = {r["question_id"]: r for r in _rows(folder / "questions.parquet")}
        self.base = out.base_answers()
        self.time = max(r["time"] for r in self.events.values())
        return self.step, state

    def _manifest(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "schema_version": SCHEMA_VERSION,
            "editors": [self.editor.name],
            "references": [self.editor.name] if self.editor.traits.told_truth else [],
            "editor_configs": {self.editor.name: plain(self.editor.config)},
            "model": {"name": self.handle.name, "hash": self.handle.hash},
            "seed": self.editor.seed,
            "notes": ["trained through Avalanche: a step is an experience", *self.editor.notes],
        }


def _row(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__slots__}


def _rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def _base(a: Answered) -> BaseAnswer:
    answer = a.answer
    return BaseAnswer(
        a.item.question.id, a.item.reference, answer.generated, answer.token_hits, answer.n_tokens, answer.logprob, answer.exact
    )
