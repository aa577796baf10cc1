"""The run folder: part files, editor states and the step from which a run resumes.

Every file is written atomically (`testbed.storage.files`), so a run that is killed at any time loses no finished file.
A run resumes from its newest readable state: later files are deleted and made again, bit for bit on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from testbed.core.checksums import DAMAGED, SUMS, is_damaged, line_of, read_lines, start_sums
from testbed.core.schema import BaseAnswer, EditReport, MonitorRow, Record, folder_name
from testbed.storage import files
from testbed.storage.files import Phase, StoreError, is_complete, step_of

_LOCK = ".lock"
_LEFTOVERS = (SUMS, _LOCK, ".manifest.json.*tmp")
"""Files that a process killed before it wrote the manifest may leave in a folder that is still free."""


@dataclass(frozen=True)
class StepResults:
    """Everything that the steps since the last save produced."""

    records: list[Record] = field(default_factory=list)
    monitors: list[MonitorRow] = field(default_factory=list)
    reports: list[EditReport] = field(default_factory=list)


@dataclass(frozen=True)
class ExpectedContents:
    """The contents of a complete editor folder: the number of questions after each step, and the steps with monitors."""

    questions: Sequence[int]
    monitored: frozenset[int] = frozenset()


class RunFolder:
    """OUT: the manifest, the schedule, the answers of the unedited model, and one `EditorFolder` per editor."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, manifest: dict[str, Any]) -> None:
        """Write the manifest into an empty or new folder. Raises `StoreError` as `check_free`."""
        self.check_free()
        start_sums(self.path)
        files.write_json(self.path / "manifest.json", {**manifest, "checksums": True})

    def check_free(self) -> None:
        """Raise `StoreError` where the folder contains another run or any other file."""
        if (self.path / "manifest.json").exists():
            raise StoreError(f"{self.path} holds a run already: go on with --resume {self.path}, or choose another --out")
        if self.path.exists() and (not self.path.is_dir() or any(not any(map(p.match, _LEFTOVERS)) for p in self.path.iterdir())):
            raise StoreError(f"{self.path} is not an empty folder: choose another --out")

    def locked(self) -> AbstractContextManager[None]:
        """Reserve the folder for this process inside the block. Raises `StoreError` where another process writes it."""
        return files.locked(self.path / _LOCK, "--out", wait=False)

    def manifest(self) -> dict[str, Any]:
        """The stored manifest. Raises `StoreError` where there is none or it is damaged, or the sums of the folder are lost."""
        path = self.path / "manifest.json"
        if is_damaged(path):
            raise StoreError(f"{path} {DAMAGED}; restore it from a copy")
        manifest = files.read_json(path)
        if manifest.get("checksums") and not (self.path / SUMS).is_file():
            raise StoreError(f"{self.path / SUMS} is missing, so nothing says whether the run is as it was written; restore it from a copy")
        return manifest

    def add_note(self, line: str) -> None:
        """Add a line to the notes of the manifest, once."""
        manifest = self.manifest()
        if line not in manifest["notes"]:
            files.write_json(self.path / "manifest.json", {**manifest, "notes": [*manifest["notes"], line]})

    def check_same(
        self, manifest: dict[str, Any], keys: Sequence[str], ignored: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
    ) -> None:
        """Raise `StoreError` that lists every difference between the stored manifest and this one, except `ignored` entries.

        Another schedule of the same run is told apart: another version of the testbed planned its questions.

        defaults: for fields of `config` that the version which made the run did not know, their values.
        """
        stored = self.manifest()
        stored["config"] = {**(defaults or {}), **stored.get("config", {})}
        lines = [line for k in keys for line in _differences(k, stored.get(k), manifest.get(k), ignored)]
        if lines and all(line.startswith("schedule_hash:") for line in lines):
            began = (stored.get("versions") or {}).get("lifelong-editing-testbed", "?")
            began += f", commit {stored['git']}" if stored.get("git") else ""
            raise StoreError(
                f"{self.path} cannot go on: configuration, data and model are its own, but this version of the testbed asks other "
                f"questions than the one that began it ({began}): finish it with that version, or begin a new run"
            )
        if lines:
            text = "\n  ".join(lines)
            raise StoreError(f"{self.path} cannot go on, it was made with another configuration, data or model:\n  {text}")

    def n_steps(self) -> int | None:
        """The number of steps of the run; None where its schedule is absent or damaged."""
        path = self.path / "schedule.parquet"
        return max(pq.read_table(path, columns=["step"])["step"].to_pylist()) if is_complete(path) else None

    def event_ids(self) -> list[str]:
        """The ids of the run's edits; empty where the file is absent or damaged."""
        path = self.path / "events.parquet"
        return pq.read_table(path, columns=["edit_id"])["edit_id"].to_pylist() if is_complete(path) else []

    def base_answers(self) -> dict[str, BaseAnswer]:
        """The stored answers of the unedited model by question id; empty where the file is absent or damaged."""
        path = self.path / "base" / "answers.parquet"
        rows = pq.read_table(path).to_pylist() if is_complete(path) else []
        return {r["question_id"]: BaseAnswer(**r) for r in rows}

    def write_base_answers(self, answers: Iterable[BaseAnswer]) -> None:
        """Store the answers of the unedited model. Raises `StoreError`."""
        files.write_rows(self.path / "base" / "answers.parquet", BaseAnswer, answers)

    def editor(self, name: str, phase: Phase | None = None, saved: Callable[[StepResults], None] | None = None) -> EditorFolder:
        return EditorFolder(self.path / folder_name(name), phase, saved)


def _differences(name: str, stored: Any, now: Any, ignored: Sequence[str]) -> list[str]:
    if isinstance(stored, dict) and isinstance(now, dict):
        return [line for k in sorted({*stored, *now}) for line in _differences(f"{name}.{k}", stored.get(k), now.get(k), ignored)]
    return [] if stored == now or name in ignored else [f"{name}: stored {stored!r}, now {now!r}"]


class EditorFolder:
    """OUT/EDITOR: records, monitors, reports and state up to the newest saved step.

    phase: callback for the start of each phase of a save. saved: callback for the results that were just saved.
    """

    def __init__(self, path: Path, phase: Phase | None = None, saved: Callable[[StepResults], None] | None = None) -> None:
        self.path, self._phase, self._saved = path, phase, saved
        self._reports = path / "edits.jsonl"

    def save(self, step: int, results: StepResults, state: dict[str, Any]) -> None:
        """Add the results since the last save, then the state after them; delete older states. Raises `StoreError`."""
        for folder, row, rows in (("records", Record, results.records), ("monitors", MonitorRow, results.monitors)):
            if rows:
                files.write_rows(self.path / folder / f"step-{step:06d}.parquet", row, rows, self._phase, step)
        files.append(self._reports, "".join(line_of(asdict(r)) for r in results.reports))
        files.write_state(self.path / "state" / f"step-{step:06d}.safetensors", state, self._phase)
        for old in self._states()[:-1]:
            old.unlink()
        if self._saved is not None:
            self._saved(results)

    def resume(
        self, expected: ExpectedContents | None = None, say: Callable[[str], None] = lambda line: None
    ) -> tuple[int, dict[str, Any] | None]:
        """Delete everything after the newest saved step; return that step and its state, (0, None) without a state.

        Where records, monitors or reports up to that step are damaged or missing, the editor starts again from step 0;
        without `expected` a missing file goes unnoticed. say: callback for what is damaged, one line each.
        """
        for leftover in self.path.rglob(".*.tmp"):
            leftover.unlink()
        step, state = self._newest_readable(say)
        if lost := self._lost(step, expected):
            say(f"{lost}: {self.path.name} starts again from its first edit")
            step, state = 0, None
        for path in [*self._parts(), *self._states()]:
            if step_of(path) > step:
                path.unlink()
        kept = "".join(line_of(line) for line in read_lines(self._reports)[0] if line["step"] <= step)
        if self._reports.exists() and kept.encode() != self._reports.read_bytes():
            with files.replacing(self._reports) as temporary:
                temporary.write_text(kept, encoding="utf-8")
        return step, state

    def _newest_readable(self, say: Callable[[str], None]) -> tuple[int, dict[str, Any] | None]:
        for path in reversed(self._states()):
            try:
                return step_of(path), files.read_state(path)
            except StoreError as error:
                say(str(error))
                path.unlink()
        return 0, None

    def _lost(self, step: int, expected: ExpectedContents | None) -> str | None:
        """What is damaged or missing up to a step; None where there is a report for each step and every file is whole."""
        reports, damaged = read_lines(self._reports)
        if damaged or [r["step"] for r in reports if r["step"] <= step] != list(range(1, step + 1)):
            return f"{self._reports} is damaged or lacks reports of steps 1 to {step}"
        if step == 0 and len({step_of(p) for p in self._parts()}) > 1:  # a kill in the first save leaves the parts of one step
            return f"{self.path} holds answers and no readable state"
        parts = [p for p in self._parts() if step_of(p) <= step]
        if broken := [p for p in parts if not is_complete(p)]:
            return f"{broken[0]} is damaged"
        if expected is None:
            return None
        answers, planned = sum(pq.read_metadata(p).num_rows for p in parts if p.parent.name == "records"), sum(expected.questions[:step])
        if answers != planned:
            return f"{self.path / 'records'} holds {answers} answers up to step {step}, the schedule {planned}"
        monitors = [pq.read_table(p, columns=["step"])["step"].to_pylist() for p in parts if p.parent.name == "monitors"]
        missing = {s for s in expected.monitored if s <= step} - set(chain(*monitors))
        return f"{self.path / 'monitors'} lacks the signals of steps {sorted(missing)}" if missing else None

    def signals(self) -> set[str]:
        """The names of the monitors that have stored values."""
        parts = [p for p in self._parts() if p.parent.name == "monitors" and is_complete(p)]
        return {name for p in parts for name in pq.read_table(p, columns=["name"])["name"].unique().to_pylist()}

    def newest(self) -> tuple[int, dict[str, Any]]:
        """The newest saved step and its state. Raises `StoreError` when there is none."""
        states = self._states()
        if not states:
            raise StoreError(f"{self.path} holds no saved state: the run stopped before its first save")
        return step_of(states[-1]), files.read_state(states[-1])

    def _parts(self) -> list[Path]:
        return sorted(p for folder in ("records", "monitors") for p in (self.path / folder).glob("step-*.parquet"))

    def _states(self) -> list[Path]:
        return sorted((self.path / "state").glob("step-*.safetensors"))
