"""The run folder: atomic part files, editor state, the point to go on from.

Every file is written under a temporary name, flushed to disk and renamed, so a reader never sees half a
file and a run that is cut at any byte loses nothing that was finished. The newest readable state is the
point to go on from: whatever was written after it is set aside and made again, equal bit for bit on CPU.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from testbed.schema import BaseAnswer, EditReport, Record, columns, folder_name

_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_(), list: pa.list_(pa.string())}
Phase = Callable[[str, int], None]
_LOCK = ".lock"
_OURS = {".manifest.json.tmp", _LOCK}
"""What a process that was stopped before the manifest stood may leave in a folder that is still free."""


class StoreError(RuntimeError):
    """A folder that cannot be used or written: which, why, what to do."""


def arrow_schema(row: type) -> pa.Schema:
    """The arrow schema of a row dataclass."""
    return pa.schema([pa.field(n, _ARROW[t], nullable=absent) for n, (t, absent) in columns(row).items()])


@contextmanager
def replacing(path: Path, phase: Phase | None = None, step: int = 0) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends well. Raises `StoreError` on a full disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if phase:
            phase("write", step)
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        if phase:
            phase("rename", step)
        os.replace(temporary, path)
        _flush_folder(path.parent)
    except (OSError, SafetensorError) as e:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if getattr(e, "errno", None) == errno.ENOSPC or "No space left" in str(e):
            raise StoreError(f"no space left on the disk of {path.parent}: free some and go on with --resume") from e
        raise StoreError(f"{path} cannot be written: {e}") from e


def _flush_folder(path: Path) -> None:
    """The names in a folder on disk, so that a later file never outlives an earlier one in a power cut."""
    at = os.open(path, os.O_RDONLY)
    try:
        os.fsync(at)
    finally:
        os.close(at)


def write_rows(path: Path, row: type, rows: Iterable[Any], phase: Phase | None = None, step: int = 0) -> None:
    """A parquet file of row dataclasses, atomically."""
    listed = [r if isinstance(r, dict) else _as_dict(r) for r in rows]
    table = pa.Table.from_pylist(listed, schema=arrow_schema(row))
    with replacing(path, phase, step) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def _as_dict(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in row.__slots__}


def _whole(path: Path) -> bool:
    """True for a parquet file that is there and was not cut: its footer stands last."""
    try:
        return pq.ParquetFile(path).metadata is not None
    except (OSError, pa.ArrowException):
        return False


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Raises `StoreError` for a file that is absent or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise StoreError(f"{path} does not exist: {path.parent} is not a run folder") from e
    except ValueError as e:
        raise StoreError(f"{path} is not readable JSON ({e}): the folder was damaged; start a new run") from e


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
        rows = pq.read_table(path).to_pylist() if _whole(path) else []
        return {r["question_id"]: BaseAnswer(**r) for r in rows}

    def write_base_answers(self, answers: Iterable[BaseAnswer]) -> None:
        write_rows(self.path / "base" / "answers.parquet", BaseAnswer, answers)

    def editor(self, name: str, phase: Phase | None = None) -> EditorFolder:
        return EditorFolder(self.path / folder_name(name), phase)


def _differences(name: str, stored: Any, now: Any, free: Sequence[str]) -> list[str]:
    """One line for every value in which two entries differ."""
    if isinstance(stored, dict) and isinstance(now, dict):
        return [line for k in sorted({*stored, *now}) for line in _differences(f"{name}.{k}", stored.get(k), now.get(k), free)]
    return [] if stored == now or name in free else [f"{name}: stored {stored!r}, now {now!r}"]


class EditorFolder:
    """OUT/EDITOR: records, reports and state up to the newest saved step."""

    def __init__(self, path: Path, phase: Phase | None = None) -> None:
        self.path, self._phase = path, phase

    def save(self, step: int, records: list[Record], reports: list[EditReport], state: dict[str, Any]) -> None:
        """Add everything since the last save, then the state that goes with it; older states are removed."""
        if records:
            write_rows(self.path / "records" / f"step-{step:06d}.parquet", Record, records, self._phase, step)
        self._write_reports([*self._reports(), *(_report_line(r) for r in reports)])
        write_state(self.path / "state" / f"step-{step:06d}.safetensors", state, self._phase)
        for old in self._states()[:-1]:
            old.unlink()

    def resume(self, asked: Sequence[int] | None = None) -> tuple[int, dict[str, Any] | None]:
        """The newest saved step and its state, after setting aside all that is newer; (0, None) when there is none.

        Where a record file or the reports up to that step are damaged or gone, everything is made again from the
        start. `asked` is the number of questions after each step; without it a file that is gone is not noticed.
        """
        for leftover in self.path.rglob(".*.tmp"):
            leftover.unlink()
        step, state = self._newest_readable()
        if not self._complete(step, asked):
            step, state = 0, None
        for path in [*self._parts(), *self._states()]:
            if _step_of(path) > step:
                path.unlink()
        kept = [line for line in self._reports() if line["step"] <= step]
        if kept != self._reports(damaged=True):
            self._write_reports(kept)
        return step, state

    def _newest_readable(self) -> tuple[int, dict[str, Any] | None]:
        for path in reversed(self._states()):
            try:
                return _step_of(path), read_state(path)
            except StoreError:
                path.unlink()
        return 0, None

    def _complete(self, step: int, asked: Sequence[int] | None) -> bool:
        """True when the reports count up to this step and no record file up to it is damaged or gone."""
        steps = [line["step"] for line in self._reports() if line["step"] <= step]
        parts = [p for p in self._parts() if _step_of(p) <= step]
        if steps != list(range(1, step + 1)) or not all(map(_whole, parts)):
            return False
        return asked is None or sum(pq.read_metadata(p).num_rows for p in parts) == sum(asked[:step])

    def newest_state(self) -> dict[str, Any]:
        """The newest state. Raises `StoreError` when there is none."""
        states = self._states()
        if not states:
            raise StoreError(f"{self.path} holds no saved state: the run stopped before its first save")
        return read_state(states[-1])

    def _parts(self) -> list[Path]:
        return sorted((self.path / "records").glob("step-*.parquet"))

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


def _report_line(report: EditReport) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(report)))


def _step_of(path: Path) -> int:
    return int(path.name.split(".")[0].removeprefix("step-"))


def write_state(path: Path, state: dict[str, Any], phase: Phase | None = None) -> None:
    """Tensors as safetensors, everything else as JSON in its header (nothing is pickled)."""
    import torch
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    rest = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
    with replacing(path, phase, _step_of(path)) as temporary:
        save_file(tensors, temporary, metadata={"json": json.dumps(rest, sort_keys=True)})


def read_state(path: Path) -> dict[str, Any]:
    """The reverse. Raises `StoreError` for a file that is absent, cut or not a state."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as f:
            rest = json.loads((f.metadata() or {})["json"])
            return {**rest, **{k: f.get_tensor(k) for k in f.keys()}}  # noqa: SIM118  (no iteration on safe_open)
    except (SafetensorError, OSError, KeyError, ValueError) as e:
        raise StoreError(f"{path} is not a readable state: {e}") from e
