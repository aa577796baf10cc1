"""The run folder: part files, editor states and the step from which a run resumes.

Every file is written atomically (`testbed.storage.files`), so a run that is killed at any time loses no finished file.
A run resumes from its newest readable state: later files are deleted and made again, bit for bit on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from testbed.core.schema import BaseAnswer, EditReport, MonitorRow, Record, folder_name
from testbed.storage import files
from testbed.storage.files import Phase, StoreError, is_complete, step_of

_LOCK = ".lock"
_LEFTOVERS = {".manifest.json.tmp", _LOCK}
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
        files.write_json(self.path / "manifest.json", manifest)

    def check_free(self) -> None:
        """Raise `StoreError` where the folder contains another run or any other file."""
        if (self.path / "manifest.json").exists():
            raise StoreError(f"{self.path} holds a run already: go on with --resume {self.path}, or choose another --out")
        if self.path.exists() and (not self.path.is_dir() or any(p.name not in _LEFTOVERS for p in self.path.iterdir())):
            raise StoreError(f"{self.path} is not an empty folder: choose another --out")

    def locked(self) -> AbstractContextManager[None]:
        """Reserve the folder for this process inside the block. Raises `StoreError` where another process writes it."""
        return files.locked(self.path / _LOCK, "--out", wait=False)

    def manifest(self) -> dict[str, Any]:
        """The stored manifest. Raises `StoreError` where there is none or it is damaged."""
        return files.read_json(self.path / "manifest.json")

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

    def save(self, step: int, results: StepResults, state: dict[str, Any]) -> None:
        """Add the results since the last save, then the state after them; delete older states. Raises `StoreError`."""
        for folder, row, rows in (("records", Record, results.records), ("monitors", MonitorRow, results.monitors)):
            if rows:
                files.write_rows(self.path / folder / f"step-{step:06d}.parquet", row, rows, self._phase, step)
        self._write_reports([*self._reports(), *map(asdict, results.reports)])
        files.write_state(self.path / "state" / f"step-{step:06d}.safetensors", state, self._phase)
        for old in self._states()[:-1]:
            old.unlink()
        if self._saved is not None:
            self._saved(results)

    def resume(self, expected: ExpectedContents | None = None) -> tuple[int, dict[str, Any] | None]:
        """Delete everything after the newest saved step; return that step and its state, (0, None) without a state.

        Where records, monitors or reports up to that step are damaged or missing, the editor starts again from step 0;
        without `expected` a missing file goes unnoticed.
        """
        for leftover in self.path.rglob(".*.tmp"):
            leftover.unlink()
        step, state = self._newest_readable()
        if not self._complete(step, expected):
            step, state = 0, None
        for path in [*self._parts(), *self._states()]:
            if step_of(path) > step:
                path.unlink()
        kept = [line for line in self._reports() if line["step"] <= step]
        if _as_lines(kept) != self._report_text():
            self._write_reports(kept)
        return step, state

    def _newest_readable(self) -> tuple[int, dict[str, Any] | None]:
        for path in reversed(self._states()):
            try:
                return step_of(path), files.read_state(path)
            except StoreError:
                path.unlink()
        return 0, None

    def _complete(self, step: int, expected: ExpectedContents | None) -> bool:
        """True when there is a report for each step up to this one and no file up to it is damaged or missing."""
        steps = [line["step"] for line in self._reports() if line["step"] <= step]
        parts = [p for p in self._parts() if step_of(p) <= step]
        if steps != list(range(1, step + 1)) or not all(map(is_complete, parts)):
            return False
        if expected is None:
            return True
        answers = sum(pq.read_metadata(p).num_rows for p in parts if p.parent.name == "records")
        monitors = [pq.read_table(p, columns=["step"])["step"].to_pylist() for p in parts if p.parent.name == "monitors"]
        return answers == sum(expected.questions[:step]) and {s for s in expected.monitored if s <= step} <= set(chain(*monitors))

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

    def _report_text(self) -> str:
        path = self.path / "edits.jsonl"
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def _reports(self) -> list[dict[str, Any]]:
        """The stored reports without a last line that was truncated."""
        reports: list[dict[str, Any]] = []
        for line in self._report_text().splitlines():
            with suppress(ValueError):
                reports.append(json.loads(line))
        return reports

    def _write_reports(self, reports: Iterable[dict[str, Any]]) -> None:
        with files.replacing(self.path / "edits.jsonl") as temporary:
            temporary.write_text(_as_lines(reports), encoding="utf-8")


def _as_lines(reports: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(r, sort_keys=True) + "\n" for r in reports)
