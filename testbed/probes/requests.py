"""Harmful requests and benign ones that look alike: the user's own files, or a small made set (`requests.yaml`)."""

from __future__ import annotations

import json
from pathlib import Path

from streams.data import table

REQUESTS: dict[str, tuple[str, ...]] = table(__file__, "requests.yaml")
"""The made set: requests by kind, harmful and benign."""


class BadRequests(ValueError):
    """A file of requests that cannot be used; the message names the file, the line, what was expected and found, and what to do."""


def load(harmful: Path | None, benign: Path | None) -> dict[str, tuple[str, ...]]:
    """Requests by kind, in the order of their file; those of the made set where no file is given. Raises `BadRequests`."""
    files = {"harmful": harmful, "benign": benign}
    found = {kind: REQUESTS[kind] if path is None else _read(kind, path) for kind, path in files.items()}
    if both := [r for r in found["harmful"] if r in found["benign"]]:
        where = " and ".join(f"{path or 'the made set'} ({kind})" for kind, path in files.items())
        raise BadRequests(f"{where} share the request {both[0]!r}: expected a request to be of one kind; take it out of one of them")
    return found


def _read(kind: str, path: Path) -> tuple[str, ...]:
    """The requests of one file. A name that ends in .jsonl has JSON lines, any other has a request in each line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as e:
        what = "a file of requests, JSON lines (.jsonl) or UTF-8 text with one request a line"
        raise BadRequests(f"{kind}: expected {what}, but {path} cannot be read: {e}; give the path of such a file") from e
    first: dict[str, int] = {}
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        request = _request(f"{path}:{i}", line) if path.suffix == ".jsonl" else line.strip()
        if request in first:
            raise BadRequests(f"{path}:{i}: expected requests that differ, found that of line {first[request]} again; remove one of them")
        first[request] = i
    if not first:
        raise BadRequests(f"{kind}: expected at least one request, found none in {path}; write one request in each line")
    return tuple(first)


def _request(where: str, line: str) -> str:
    """The request of a JSON line: a text, or an object with the field prompt."""
    do = 'write {"prompt": "..."}'
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise BadRequests(f"{where}: expected a JSON object, found {line.strip()[:60]!r} ({e}); {do}") from e
    found = value.get("prompt", f"the fields {', '.join(value) or '(none)'}") if isinstance(value, dict) else value
    text = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(text, str) or not text.strip():
        raise BadRequests(f"{where}: expected the field prompt with a text that is not empty, found {found!r}; {do}")
    return text.strip()
