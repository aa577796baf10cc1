"""Records of one's own as files, and the streams that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from streams.base import Stream, StreamConfig
from testbed.core.registry import STREAMS

N = 80
"""Records of a file."""


def record(i: int, **more: Any) -> dict[str, Any]:
    asked = {"prompt": f"The colour of town {i} is", "target": f"new {i}", "previous": f"old {i}", "subject": f"town {i}"}
    return {**asked, "relation": "colour", **more}


def stream(folder: Path, rows: Any, name: str = "own.jsonl", **config: Any) -> Stream:
    if isinstance(rows, list):
        rows = "\n".join(json.dumps(r) for r in rows)
    (folder / name).write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    return STREAMS.get(f"jsonl:{name}")(StreamConfig(data_root=folder, **config))


def passed_over(s: Stream) -> dict[str, int]:
    return s.manifest()["passed_over"]


def questions(s: Stream, split: str) -> list[tuple[str, str | None]]:
    return [(q.prompt, q.answer) for e in s.events(N) if e.kind == "add" for q in s.questions(e) if q.split == split]
