# pyright: strict
"""SHA-256 of every file of a run folder, which `sha256sum --check --ignore-missing` reads, so that a flipped bit is noticed.

OUT/SHA256SUMS gets a file's line before the file is put in place, so that no crash leaves a file without one; of several
lines for one name any may fit. A folder of an older version has no such file, and nothing in it is checked. Files that
grow line by line carry a checksum in each line instead.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
from collections import defaultdict
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

SUMS = "SHA256SUMS"
DAMAGED = "is damaged: it is not what was written (SHA256SUMS)"
_LINE_SUM = "sha256"
"""Key of a line's checksum: the first 16 hex digits of the SHA-256 of its other entries."""


def start_sums(folder: Path) -> None:
    """From here on every file that is put into the folder has a line."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMS).touch()


def note_sum(temporary: Path, path: Path) -> None:
    """Append the line of a file that is about to be put in place, where a folder above it keeps sums."""
    root = _root(path)
    if root is not None:
        with _alone(root), open(root / SUMS, "a", encoding="utf-8") as f:
            f.write(f"{_file_sum(temporary)}  {path.relative_to(root).as_posix()}\n")
            f.flush()
            os.fsync(f.fileno())


def drop_older_sums(path: Path) -> None:
    """Leave of a file that was just put in place the newest line alone."""
    root = _root(path)
    if root is None:
        return
    with _alone(root):
        lines, end = (root / SUMS).read_bytes().splitlines(keepends=True), f"  {path.relative_to(root).as_posix()}\n".encode()
        own = [n for n, line in enumerate(lines) if line.endswith(end)]
        if len(own) > 1:
            temporary = root / f".{SUMS}.{secrets.token_hex(4)}.tmp"
            with open(temporary, "xb") as f:
                f.writelines(line for n, line in enumerate(lines) if n not in own[:-1])
            os.replace(temporary, root / SUMS)


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Inside, no other process changes the sums of the folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_damaged(path: Path) -> bool:
    """Whether a file that is there is not as it was written; False in a folder without sums."""
    root = _root(path)
    if root is None or not path.is_file():
        return False
    now, kept = path.stat(), _sums(root / SUMS, (root / SUMS).stat().st_mtime_ns)
    return _known_sum(path, now.st_size, now.st_mtime_ns) not in kept[path.relative_to(root).as_posix()]


def line_of(row: Mapping[str, Any]) -> str:
    """A row as a line of JSON with its checksum."""
    return json.dumps({**row, _LINE_SUM: _row_sum(row)}, sort_keys=True) + "\n"


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a file of such lines, and the numbers of the lines (from 1) that are damaged.

    A last line without its end was cut by a kill while it was written, so it is neither. Lines of an older version have no
    checksum; they are believed where the folder keeps no sums.
    """
    rows: list[dict[str, Any]] = []
    damaged: list[int] = []
    lines, checked = path.read_bytes().split(b"\n") if path.is_file() else [], _root(path) is not None
    for number, line in enumerate(lines, 1):
        row = _row(line, checked)
        if row is not None:
            rows.append(row)
        elif number < len(lines):
            damaged.append(number)
    return rows, damaged


def _row(line: bytes, checked: bool) -> dict[str, Any] | None:
    """The row of a line without its checksum; None where the line is damaged."""
    try:
        row = json.loads(line)
        kept = row.pop(_LINE_SUM, None)
    except (ValueError, AttributeError, TypeError):
        return None
    return row if kept == _row_sum(row) or (kept is None and not checked) else None


def _row_sum(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


def _file_sum(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


@lru_cache(maxsize=4096)
def _known_sum(path: Path, size: int, modified: int) -> str:
    """The sum of a file as it is now: size and time of change are part of the key."""
    return _file_sum(path)


def _root(path: Path) -> Path | None:
    """The nearest folder above a file that keeps sums."""
    return next((folder for folder in path.parents[:4] if (folder / SUMS).is_file()), None)


@lru_cache(maxsize=8)
def _sums(path: Path, modified: int) -> defaultdict[str, set[str]]:
    """The sums by name; `modified` is part of the key, so that a file that grew is read again."""
    out: defaultdict[str, set[str]] = defaultdict(set)
    for line in path.read_text("utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        out[name].add(digest)
    return out
