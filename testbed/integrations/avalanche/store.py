"""Storage of an editor's training and answers under Avalanche as a run folder, in which an experience is a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from testbed.core.events import LOCALITY_SPLITS, EditEvent, content_id
from testbed.core.schema import SCHEMA_VERSION, BaseAnswer, EditReport, EventRow, QuestionRow, Record
from testbed.editors.base import Editor
from testbed.experiment.answering import Answer
from testbed.experiment.config import plain
from testbed.experiment.schedule import Schedule, ScheduledQuestion, Step
from testbed.integrations.avalanche.benchmark import EvalItem
from testbed.model.handle import ModelHandle
from testbed.probes.base import Applied, Checkpoint, Planned
from testbed.storage.files import StoreError, write_rows
from testbed.storage.run_folder import RunFolder, StepResults

_AFTER = ("right_after", "immediate")
"""Probe and panel of the answer to an edit right after its experience, named as in the testbed's own runs."""
_PANEL = ("avalanche", "stream")
"""Probe and panel of every answer."""


class RunRecorder:
    """Collects records, reports and the texts behind them from the start or from the last `resume`, and writes a run folder."""

    def __init__(self, editor: Editor, handle: ModelHandle) -> None:
        self.editor, self.handle = editor, handle
        self.step, self.time = 0, 0.0
        self.unsaved: list[tuple[list[Record], EditReport]] = []
        self.events: dict[str, dict[str, Any]] = {}
        self.questions: dict[str, dict[str, Any]] = {}
        self.base: dict[str, BaseAnswer] = {}
        self.run = content_id("avalanche", editor.name, plain(editor.config), editor.seed, handle.hash)

    def add_edits(self, edits: Sequence[EditEvent], report: EditReport) -> None:
        """Record that an experience was trained; answers that are added from now on were given after it."""
        self.step, self.time = self.step + 1, edits[-1].time
        for e in edits:
            if e.revises in self.events:
                self.events[e.revises]["superseded_step"] = self.step
        applied = tuple(Applied(e, self.step, len(self.events) + i + 1) for i, e in enumerate(edits))
        self.events |= {row.edit_id: asdict(row) for row in self._schedule(applied, ()).event_rows()}
        self.unsaved.append(([], replace(report, step=self.step)))

    def add_answers(self, items: Sequence[EvalItem], answers: Sequence[Answer]) -> None:
        """Record answers; those given before the first edit are the unedited model's."""
        asked = tuple(ScheduledQuestion(Planned(item.question, _PANEL[1]), _PANEL[0], 1) for item in items)
        self.questions |= {row.question_id: asdict(row) for row in self._schedule((), asked).question_rows()}
        for item, answer in zip(items, answers):
            question = item.question
            if self.step == 0:
                own = {k: v for k, v in vars(answer).items() if k != "extras"}
                self.base[question.id] = BaseAnswer(question.id, item.reference, **own)
                continue
            right_after = question.split == "edit" and self.events.get(question.event_id or "", {}).get("step") == self.step
            self.unsaved[-1][0].extend(self._as_record(item, answer, *panel) for panel in (_PANEL, _AFTER)[: 1 + right_after])

    def _schedule(self, edits: tuple[Applied, ...], asked: tuple[ScheduledQuestion, ...]) -> Schedule:
        """A schedule of the current step alone, which makes the same rows of events and questions as in any run."""
        n = len(self.events)
        return Schedule((Step(Checkpoint(self.step, n, self.time, frozenset(), n - len(edits)), edits, asked),))

    def _as_record(self, item: EvalItem, answer: Answer, probe: str, panel: str) -> Record:
        q, base = item.question, self.base.get(item.question.id)
        event = self.events.get(q.event_id or "", {})
        return Record(
            run=self.run,
            editor=self.editor.name,
            seed=self.editor.seed,
            edit_id=q.event_id,
            edit_step=event.get("step"),
            edit_time=event.get("time"),
            probe_step=self.step,
            probe_time=self.time,
            probe=probe,
            probe_version=1,
            split=q.split,
            topic=q.topic or event.get("relation") or "",
            question_id=q.id,
            answer=item.reference,
            target=event.get("target"),
            base_answer=item.reference if q.split in LOCALITY_SPLITS else (base.generated if base else None) or "",
            panel=panel,
            incl_prob=1.0,
            seconds=0.0,
            **vars(answer),
        )

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write everything since the last save, and the state. Raises `StoreError` for a folder that holds another run."""
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
        results = StepResults([r for records, _ in self.unsaved for r in records], reports=[report for _, report in self.unsaved])
        out.editor(self.editor.name).save(self.step, results, state)
        self.unsaved = []

    def resume(self, folder: Path) -> tuple[int, dict[str, Any]]:
        """Read a folder; returns the number of trained experiences and the state after them. Raises `StoreError`."""
        out = RunFolder(folder)
        if out.manifest().get("run") != self.run:
            raise StoreError(f"{folder} holds the run of another editor, configuration or model; it cannot go on with this one")
        self.step, state = out.editor(self.editor.name).resume()
        if state is None:
            raise StoreError(f"{folder} holds no readable state of {self.editor.name}: start anew")
        self.events = {r["edit_id"]: r for r in pq.read_table(folder / "events.parquet").to_pylist()}
        self.questions = {r["question_id"]: r for r in pq.read_table(folder / "questions.parquet").to_pylist()}
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
