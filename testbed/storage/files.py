"""Atomic files: rows, JSON and states are written under a temporary name, flushed and renamed, so no reader sees half a file."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from testbed.core.checksums import DAMAGED, drop_older_sums, is_damaged, note_sum
from testbed.core.schema import columns

_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_(), list: pa.list_(pa.string())}
Phase = Callable[[str, int], None]
"""Callback for the start of a phase (write, rename, ...) and its step."""


class StoreError(RuntimeError):
    """A folder cannot be used or written; the message gives the folder, the reason and the remedy."""


def arrow_schema(row: type) -> pa.Schema:
    """The arrow schema of a row dataclass."""
    return pa.schema([pa.field(n, _ARROW[t], nullable=optional) for n, (t, optional) in columns(row).items()])


@contextmanager
def replacing(path: Path, phase: Phase | None = None, step: int = 0) -> Generator[Path]:
    """A temporary path that replaces `path` when the block ends without an error. Raises `StoreError`, also for a full disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(mode=0o644, exist_ok=False)  # a name that nobody can foresee, so no link is followed
        if phase:
            phase("write", step)
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        note_sum(temporary, path)
        if phase:
            phase("rename", step)
        os.replace(temporary, path)
        drop_older_sums(path)
        _flush_folder(path.parent)
    except (OSError, SafetensorError) as e:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise _cannot_write(path, e) from e


def append(path: Path, text: str) -> None:
    """Add text at the end of a file and flush it. Raises `StoreError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise _cannot_write(path, e) from e


def _cannot_write(path: Path, error: Exception) -> StoreError:
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return StoreError(f"no space left on the disk of {path.parent}: free some and go on with --resume")
    return StoreError(f"{path} cannot be written: {error}")


def _flush_folder(path: Path) -> None:
    """Flush the names in a folder to disk, so that a later file never outlives an earlier one in a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(lock: Path, option: str, wait: bool = True) -> Generator[None]:
    """Hold a lock file inside the block; the death of the process releases it.

    option: the command line option that chooses the folder, for messages. Raises `StoreError` where the folder cannot be
    written, or, without `wait`, where another process holds the lock.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock, timeout=-1 if wait else 0).acquire()
    except Timeout as e:
        raise StoreError(f"{lock.parent} is being written by another process: wait for it, stop it, or choose another {option}") from e
    except OSError as e:
        raise StoreError(f"{lock.parent} cannot be written: {e}; choose another {option}") from e
    with held:
        yield


def write_rows(path: Path, row: type, rows: Iterable[Any], phase: Phase | None = None, step: int = 0) -> None:
    """Write row dataclasses (or dicts of their fields) as a parquet file. Raises `StoreError`."""
    listed = [r if isinstance(r, dict) else {name: getattr(r, name) for name in r.__slots__} for r in rows]
    table = pa.Table.from_pylist(listed, schema=arrow_schema(row))
    with replacing(path, phase, step) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def is_complete(path: Path) -> bool:
    """True for a parquet file that exists and is as it was written (of an older version: not truncated, its footer comes last)."""
    try:
        return pq.ParquetFile(path).metadata is not None and not is_damaged(path)
    except (OSError, pa.ArrowException):
        return False


def write_json(path: Path, value: Any) -> None:
    """Write JSON with sorted keys. Raises `StoreError`."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON. Raises `StoreError` for a file that is absent or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise StoreError(f"{path} does not exist: {path.parent} is not a run folder") from e
    except ValueError as e:
        raise StoreError(f"{path} is not readable JSON ({e}): the folder was damaged; start a new run") from e


def step_of(path: Path) -> int:
    """The step in a file name of the form step-000050.parquet."""
    return int(path.name.split(".")[0].removeprefix("step-"))


def write_state(path: Path, state: dict[str, Any], phase: Phase | None = None) -> None:
    """Write tensors as safetensors and everything else as JSON in the header; nothing is pickled. Raises `StoreError`."""
    import torch  # imported here: reading rows needs no torch
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    rest = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
    with replacing(path, phase, step_of(path)) as temporary:
        save_file(tensors, temporary, metadata={"json": json.dumps(rest, sort_keys=True)})


def read_state(path: Path) -> dict[str, Any]:
    """Read what `write_state` wrote, copied: tensors of a file are not aligned, and products of such tensors may be rounded otherwise.

    Raises `StoreError` for a file that is absent, damaged or no state.
    """
    if is_damaged(path):
        raise StoreError(f"{path} {DAMAGED}; --resume makes it again")
    try:
        with safe_open(path, "pt") as f:
            rest = json.loads((f.metadata() or {})["json"])
            return {**rest, **{k: f.get_tensor(k).clone() for k in f.keys()}}  # noqa: SIM118  (no iteration on safe_open)
    except (SafetensorError, OSError, KeyError, ValueError) as e:
        raise StoreError(f"{path} is not a readable state: {e}") from e
