"""The run folder: atomic part files, editor state, the point to go on from.

Every file is written under a temporary name, flushed to disk and renamed, so a reader never sees half a
file and a run that is cut at any byte loses nothing that was finished. The newest readable state is the
point to go on from: whatever was written after it is set aside and made again, equal bit for bit on CPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from testbed.core.schema import BaseAnswer, EditReport, MonitorRow, Record, folder_name
from testbed.storage.files import Phase, StoreError, read_json, read_state, replacing, step_of, whole, write_json, write_rows, write_state

_LOCK = ".lock"
_OURS = {".manifest.json.tmp", _LOCK}
"""What a process that was stopped before the manifest stood may leave in a folder that is still free."""


class RunFolder:
    """OUT: the manifest, the schedule, the base's answers, one `EditorFolder` an editor."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, manifest: dict[str, Any]) -> None:
        """Write the manifest into an empty or new folder. Raises `StoreError` as `check_free`."""
        self.check_free()
        write_json(self.path / "manifest.json", manifest)

    def check_free(self) -> None:
        """Raise `StoreError` where the folder holds another run or anything else."""
        if (self.path / "manifest.json").exists():
            raise StoreError(f"{self.path} holds a run already: go on with --resume {self.path}, or choose another --out")
        if self.path.exists() and (not self.path.is_dir() or any(p.name not in _OURS for p in self.path.iterdir())):
            raise StoreError(f"{self.path} is not an empty folder: choose another --out")

    @contextmanager
    def held(self) -> Iterator[None]:
        """This process alone writes the folder. Raises `StoreError` where another one does; its death frees the folder."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / _LOCK, timeout=0)
            lock.acquire()
        except Timeout as e:
            raise StoreError(f"{self.path} is being written by another process: wait for it, stop it, or choose another --out") from e
        except OSError as e:
            raise StoreError(f"{self.path} cannot be written: {e}; choose another --out") from e
        try:
            yield
        finally:
            lock.release()

    def manifest(self) -> dict[str, Any]:
        return read_json(self.path / "manifest.json")

    def add_note(self, line: str) -> None:
        """Add a line to the manifest's notes, once."""
        manifest = self.manifest()
        if line not in manifest["notes"]:
            write_json(self.path / "manifest.json", {**manifest, "notes": [*manifest["notes"], line]})

    def check_same(self, manifest: dict[str, Any], keys: Sequence[str], free: Sequence[str] = ()) -> None:
        """Raise `StoreError` naming every entry in which the stored manifest and this one differ, but for the `free` ones."""
        stored = self.manifest()
        differ = [line for k in keys for line in _differences(k, stored.get(k), manifest.get(k), free)]
        if differ:
            text = "\n  ".join(differ)
            raise StoreError(f"{self.path} cannot go on, it was made with another configuration, data or model:\n  {text}")

    def base_answers(self) -> dict[str, BaseAnswer]:
        """The stored answers of the unedited model by question id; none where the file is absent or damaged."""
        path = self.path / "base" / "answers.parquet"
        rows = pq.read_table(path).to_pylist() if whole(path) else []
        return {r["question_id"]: BaseAnswer(**r) for r in rows}

    def write_base_answers(self, answers: Iterable[BaseAnswer]) -> None:
        write_rows(self.path / "base" / "answers.parquet", BaseAnswer, answers)

    def editor(self, name: str, phase: Phase | None = None, saved: Callable[[Found], None] | None = None) -> EditorFolder:
        return EditorFolder(self.path / folder_name(name), phase, saved)


def _differences(name: str, stored: Any, now: Any, free: Sequence[str]) -> list[str]:
    """One line for every value in which two entries differ."""
    if isinstance(stored, dict) and isinstance(now, dict):
        return [line for k in sorted({*stored, *now}) for line in _differences(f"{name}.{k}", stored.get(k), now.get(k), free)]
    return [] if stored == now or name in free else [f"{name}: stored {stored!r}, now {now!r}"]


@dataclass(frozen=True)
class Found:
    """What the steps since the last save brought."""

    records: list[Record] = field(default_factory=list)
    monitors: list[MonitorRow] = field(default_factory=list)
    reports: list[EditReport] = field(default_factory=list)


@dataclass(frozen=True)
class Expected:
    """What an editor's folder must hold when it is whole: questions after each step, steps with monitors."""

    asked: Sequence[int]
    monitored: frozenset[int] = frozenset()


class EditorFolder:
    """OUT/EDITOR: records, monitors, reports and state up to the newest saved step. `saved` is told what was just kept."""

    def __init__(self, path: Path, phase: Phase | None = None, saved: Callable[[Found], None] | None = None) -> None:
        self.path, self._phase, self._saved = path, phase, saved

    def save(self, step: int, found: Found, state: dict[str, Any]) -> None:
        """Add everything since the last save, then the state that goes with it; older states are removed."""
        for folder, row, rows in (("records", Record, found.records), ("monitors", MonitorRow, found.monitors)):
            if rows:
                write_rows(self.path / folder / f"step-{step:06d}.parquet", row, rows, self._phase, step)
        self._write_reports([*self._reports(), *(_report_line(r) for r in found.reports)])
        write_state(self.path / "state" / f"step-{step:06d}.safetensors", state, self._phase)
        for old in self._states()[:-1]:
            old.unlink()
        if self._saved is not None:
            self._saved(found)

    def resume(self, expected: Expected | None = None) -> tuple[int, dict[str, Any] | None]:
        """The newest saved step and its state, after setting aside all that is newer; (0, None) when there is none.

        Where a file of records or monitors or the reports up to that step are damaged or gone, everything is made
        again from the start; without `expected` a file that is gone is not noticed.
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
        if kept != self._reports(damaged=True):
            self._write_reports(kept)
        return step, state

    def _newest_readable(self) -> tuple[int, dict[str, Any] | None]:
        for path in reversed(self._states()):
            try:
                return step_of(path), read_state(path)
            except StoreError:
                path.unlink()
        return 0, None

    def _complete(self, step: int, expected: Expected | None) -> bool:
        """True when the reports count up to this step and no other file up to it is damaged or gone."""
        steps = [line["step"] for line in self._reports() if line["step"] <= step]
        parts = [p for p in self._parts() if step_of(p) <= step]
        if steps != list(range(1, step + 1)) or not all(map(whole, parts)):
            return False
        return expected is None or _holds(parts, step, expected)

    def newest(self) -> tuple[int, dict[str, Any]]:
        """The newest saved step and its state. Raises `StoreError` when there is none."""
        states = self._states()
        if not states:
            raise StoreError(f"{self.path} holds no saved state: the run stopped before its first save")
        return step_of(states[-1]), read_state(states[-1])

    def newest_state(self) -> dict[str, Any]:
        """The newest state. Raises `StoreError` when there is none."""
        return self.newest()[1]

    def _parts(self) -> list[Path]:
        return sorted(p for folder in ("records", "monitors") for p in (self.path / folder).glob("step-*.parquet"))

    def _states(self) -> list[Path]:
        return sorted((self.path / "state").glob("step-*.safetensors"))

    def _reports(self, damaged: bool = False) -> list[Any]:
        """The stored lines; a last line that was cut is dropped (or kept as text with `damaged`)."""
        path = self.path / "edits.jsonl"
        out: list[Any] = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            try:
                out.append(json.loads(line))
            except ValueError:
                if damaged:
                    out.append(line)
        return out

    def _write_reports(self, lines: list[dict[str, Any]]) -> None:
        with replacing(self.path / "edits.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(x, sort_keys=True) + "\n" for x in lines), encoding="utf-8")


def _holds(parts: Sequence[Path], step: int, expected: Expected) -> bool:
    """True when whole files hold every answer and every moment's monitors up to a step."""
    asked = sum(pq.read_metadata(p).num_rows for p in parts if p.parent.name == "records")
    seen = {s for p in parts if p.parent.name == "monitors" for s in pq.read_table(p, columns=["step"])["step"].to_pylist()}
    return asked == sum(expected.asked[:step]) and {s for s in expected.monitored if s <= step} <= seen


def _report_line(report: EditReport) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(report)))
