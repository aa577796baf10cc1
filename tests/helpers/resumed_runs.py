"""Small runs that are killed and resumed, and what must be equal afterwards."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pyarrow.parquet as pq

from testbed.core.checksums import read_lines
from tests.helpers.models import folder
from tests.helpers.warm_process import Done, command

EDITORS = ("finetune", "balancedit")


SMALL = ("--edits", 20, "--editor", ",".join(EDITORS), "--save-every", 5, "--max-new-tokens", 2, "--probe-budget", 10, "--device", "cpu")


FAST = ("--set", "finetune.steps=4", "--set", "balancedit.steps=4", "--set", "stream.edits_per_year=8")


TIMED = ("seconds", "bytes")
"""Words in the names of fields of time and memory."""


def run(out: Path, kill: str = "") -> Done:
    log = out.with_suffix(".log")
    return command("--model", folder("llava"), "--out", out, "--log", log, *SMALL, *FAST, kill=kill, figures=False)


def go_on(out: Path, kill: str = "") -> Done:
    return command("--resume", out, "--save-every", 5, "--log", out.with_suffix(".log"), kill=kill, figures=False)


@cache
def uninterrupted() -> Path:
    out = Path(mkdtemp(prefix="whole-")) / "run"
    done = run(out)
    assert done.code == 0, done.err
    return out


def untimed(value: Any) -> Any:
    """A summary without its fields of time and memory, and without the commit: other people may commit meanwhile."""
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if not any(t in k for t in TIMED) and k != "git"}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def stored(out: Path, editor: str, folder: str) -> list[dict[str, Any]]:
    rows = [r for p in sorted((out / editor / folder).glob("*.parquet")) for r in pq.read_table(p).to_pylist()]
    assert rows
    return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


def reports(out: Path, editor: str) -> list[Any]:
    return [untimed(line) for line in read_lines(out / editor / "edits.jsonl")[0]]


def assert_same(out: Path, whole: Path | None = None, said: bool = False) -> None:
    """said: the run noted what was damaged, so its notes differ."""
    whole = whole or uninterrupted()
    for editor in EDITORS:
        for rows in ("records", "monitors"):
            assert stored(out, editor, rows) == stored(whole, editor, rows)
        assert reports(out, editor) == reports(whole, editor)
        state = [p.read_bytes() for x in (out, whole) for p in (x / editor / "state").iterdir()]
        assert len(state) == 2
        assert state[0] == state[1]
    for name in ("schedule.parquet", "events.parquet", "questions.parquet", "base/answers.parquet"):
        assert pq.read_table(out / name).equals(pq.read_table(whole / name)), name
    summaries = [untimed(json.loads((x / "summary.json").read_text())) for x in (out, whole)]
    assert summaries[0]["editors"].keys() == set(EDITORS)
    for summary in summaries if said else []:
        summary["run"].pop("notes")
    assert summaries[0] == summaries[1]
    assert [p.name for p in out.rglob(".*")] == [".lock"]
