"""Find the files of a data set, and read the records of a file whatever its format, which is told by its content."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from streams.base import BadStream, Skipped
from streams.files.pictures import list_folder
from streams.files.records import digest_of, kind_of, parse_json, read_bytes

FORMATS = "JSON, JSON lines, CSV, TSV or Parquet"
MAX_BYTES = 4 << 30
"""Largest content of a compressed file that is unpacked."""


def read_rows(path: Path, skipped: list[Skipped]) -> tuple[list[Any], str]:
    """The records of a file (JSON, JSON lines, CSV, TSV or Parquet, also gzipped), and the SHA-256 of the file.

    A line that cannot be read is skipped and named. Raises `BadStream` where the whole file cannot be read.
    """
    stored = read_bytes(path)
    raw = _unpacked(stored, path) if stored.startswith(b"\x1f\x8b") else stored
    if raw.startswith(b"PAR1"):
        return _parquet(raw, path), digest_of(stored)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raw = raw.decode("utf-16", "replace").encode()
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    begins = raw.lstrip()[:1]
    if begins == b"[":
        rows = _whole(raw, path)
    elif any(map(_is_object, raw.split(b"\n", 50)[:50])) and not _is_object(raw):
        rows = list(_lines(raw, path.name, skipped))
    else:
        rows = _whole(raw, path) if begins == b"{" else list(_delimited(raw, path, skipped))
    return rows, digest_of(stored)


def _unpacked(raw: bytes, path: Path) -> bytes:
    try:
        with gzip.open(io.BytesIO(raw)) as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, EOFError) as e:
        raise BadStream(f"{path}: the gzip file cannot be unpacked: {e}. Fetch it again.") from e
    if len(content) > MAX_BYTES:
        raise BadStream(f"{path}: the gzip file holds more than {MAX_BYTES >> 30} GiB: unpack it and give a part of it.")
    return content


def _parquet(raw: bytes, path: Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as e:
        raise BadStream(f"{path}: the Parquet file cannot be read: {' '.join(str(e).split())[:200]}. Fetch it again.") from e


def _is_object(raw: bytes) -> bool:
    try:
        return isinstance(json.loads(raw.removeprefix(b"\xef\xbb\xbf").decode()), dict)
    except (ValueError, RecursionError):
        return False


def _lines(raw: bytes, name: str, skipped: list[Skipped]) -> Iterator[Any]:
    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line.removeprefix(b"\xef\xbb\xbf").decode("utf-8"))
        except UnicodeDecodeError as e:
            skipped.append(Skipped(f"{name} line {number}", f"not UTF-8 (byte {e.start} of the line): save the file as UTF-8"))
        except json.JSONDecodeError:
            skipped.append(Skipped(f"{name} line {number}", "not valid JSON: the line may have been cut short"))
        except (ValueError, RecursionError):
            skipped.append(Skipped(f"{name} line {number}", "JSON that cannot be read: a number with too many digits, or too deep nesting"))


def _whole(raw: bytes, path: Path) -> list[Any]:
    """The records of one JSON value, or of several values one after another."""
    try:
        return _records(parse_json(raw, path), path)
    except BadStream:
        text, at, out = raw.decode("utf-8", "ignore").strip(), 0, []
        if not text.startswith("{") or text.encode() != raw.strip():
            raise
        while at < len(text):
            try:
                value, at = json.JSONDecoder().raw_decode(text, at)
            except (ValueError, RecursionError):
                break
            out.append(value)
            at += len(text[at:]) - len(text[at:].lstrip())
        if at < len(text) or len(out) < 2:
            raise
        return out


def _records(top: Any, path: Path) -> list[Any]:
    """A list; the one list of an object; an object of columns; or one record."""
    if isinstance(top, list):
        return top
    if isinstance(top, Mapping) and top:
        lists = {k: v for k, v in top.items() if isinstance(v, list) and v and isinstance(v[0], Mapping)}
        if isinstance(top.get("prompt"), str) or (not lists and any(isinstance(v, str) for v in top.values())):
            return [top]
        if len(lists) == 1:
            return next(iter(lists.values()))
        if lists:
            found = ", ".join(f"{k} ({len(v)})" for k, v in lists.items())
            raise BadStream(f"{path}: expected a list of records, found several: {found}. Write the one to use into a file of its own.")
        columns = list(top.values())
        if all(isinstance(c, Mapping) and c.keys() == columns[0].keys() for c in columns):
            columns = [list(c.values()) for c in columns]
        if all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns) and len(columns) > 1:
            return [dict(zip(top, values)) for values in zip(*columns)]
    raise BadStream(f"{path}: expected a list of records, found {kind_of(top)}. Is this the right file?")


def _delimited(raw: bytes, path: Path, skipped: list[Skipped]) -> Iterator[dict[str, Any]]:
    """The rows of a table with a header, whose fields commas, tabs or semicolons separate."""
    text = raw.decode("utf-8", "surrogateescape")
    head = text.partition("\n")[0]
    delimiter = max(",\t;", key=head.count)
    if text.strip() and delimiter not in head:
        raise BadStream(f"{path}: expected a list of records ({FORMATS}), found {head[:40]!r}. Is this the right file?")
    rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in rows:
            if None in row or None in row.values():
                skipped.append(
                    Skipped(f"{path.name} line {rows.line_num}", f"expected {len(rows.fieldnames or ())} fields as in the header")
                )
            else:
                yield row
    except csv.Error as e:
        raise BadStream(f"{path}: cannot be read as a table after line {rows.line_num}: {e}. Fetch it again.") from e


def find_files(root: Path | None, paths: Sequence[str], stream: str) -> list[Path]:
    """The files under the data root that fit the first path with a file; the root itself where it is a file.

    Paths may hold wildcards, and each may begin at any of its folders. Raises `BadStream` that names what was expected and
    what was found.
    """
    expected = " or ".join(patterns := suffixes(paths))
    if root is None:
        raise BadStream(f"{stream} reads files: give their folder as --data-root (expected {expected}).")
    root = Path(root)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise BadStream(f"data root {root} is not a folder. {stream} expects {expected} in it.")
    for pattern in patterns:
        if found := sorted(p for p in root.glob(pattern) if p.is_file()):
            return found
    if below := sorted({str(p.parent) for pattern in patterns if "/" not in pattern for p in root.glob(f"*/{pattern}")}):
        raise BadStream(f"{root} is one level too high. Give as data root {' or '.join(below)}.")
    raise BadStream(f"{root} has not the files of {stream}. Expected {expected}; found {listing(root)}.")


def find_parts(root: Path | None, parts: Sequence[Sequence[str]], stream: str) -> list[Path]:
    """For each part of a set the first of its paths that is a file under the data root; parts without a file are left out.

    Raises `BadStream`, as `find_files`, where no part has a file.
    """
    return [p for part in parts if (p := first_file(root, part))] or find_files(root, [p for part in parts for p in part], stream)


def suffixes(paths: Iterable[str]) -> list[str]:
    """Each path from its last folder on, from the one above, and so on: the user may give any of them as the data root."""
    split = [path.split("/") for path in paths]
    return ["/".join(steps[i:]) for steps in split for i in reversed(range(len(steps)))]


def first_file(root: Path | None, paths: Sequence[str]) -> Path | None:
    """The first of the paths that is a file under the data root; each may begin at any of its folders."""
    return next((Path(root) / name for name in suffixes(paths) if (Path(root) / name).is_file()), None) if root else None


def listing(folder: Path) -> str:
    """The first names in a folder, for an error message."""
    return shortened([e.name for e in list_folder(folder)], 8) or "nothing"


def shortened(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
