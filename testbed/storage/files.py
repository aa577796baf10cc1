"""Files that are there whole or not at all: rows, JSON and states, written under a temporary name, flushed and renamed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError

from testbed.core.schema import columns

_ARROW = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_(), list: pa.list_(pa.string())}
Phase = Callable[[str, int], None]
"""Called with what begins (write, rename, ...) and the step."""


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


def whole(path: Path) -> bool:
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


def step_of(path: Path) -> int:
    return int(path.name.split(".")[0].removeprefix("step-"))


def write_state(path: Path, state: dict[str, Any], phase: Phase | None = None) -> None:
    """Tensors as safetensors, everything else as JSON in its header (nothing is pickled)."""
    import torch
    from safetensors.torch import save_file

    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    rest = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
    with replacing(path, phase, step_of(path)) as temporary:
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
