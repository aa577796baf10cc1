"""A flipped bit, a cut file and a lost file of a run folder are noticed: made again or named, never taken for what was written."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from itertools import chain
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from analysis.reading.load import Run, load_run
from analysis.reading.records import BadRun
from testbed.core.checksums import SUMS, is_damaged, read_lines
from testbed.storage.files import StoreError
from testbed.storage.run_folder import ExpectedContents, RunFolder
from tests.helpers.resumed_runs import EDITORS, uninterrupted

TIMES = 100
STEPS = 20


def written() -> list[str]:
    """The files of a run folder that something is read from again."""
    whole = uninterrupted()
    kept = {line.partition("  ")[2] for line in (whole / SUMS).read_text().splitlines()}
    kept |= {SUMS, *(f"{e}/edits.jsonl" for e in EDITORS)}
    return sorted(name for name in kept if (whole / name).is_file())


def damage(path: Path, at: random.Random) -> str:
    """Flip one bit, cut the file or remove it."""
    raw = bytearray(path.read_bytes())
    kind = at.choices(("flip", "cut", "remove"), (6, 2, 1))[0]
    if kind == "flip":
        place = at.randrange(len(raw))
        raw[place] ^= 1 << at.randrange(8)
    elif kind == "cut":
        del raw[at.randrange(len(raw)) :]
    path.unlink()
    if kind != "remove":
        path.write_bytes(raw)
    return kind


def expected() -> ExpectedContents:
    """What the schedule of the run asks for, read from the whole run."""
    editor = uninterrupted() / EDITORS[0]
    parts = {name: [pq.read_table(p).to_pandas() for p in (editor / name).glob("*.parquet")] for name in ("records", "monitors")}
    asked = Counter(pd.concat(parts["records"])["probe_step"])
    return ExpectedContents([asked[s] for s in range(1, STEPS + 1)], frozenset(pd.concat(parts["monitors"])["step"]))


def resumed(out: Path, planned: ExpectedContents) -> str:
    """What going on does: names what is damaged, makes it again, or finds nothing wrong."""
    folder = RunFolder(out)
    said: list[str] = []
    try:
        folder.manifest()
        base = folder.base_answers()
        steps = [folder.editor(e).resume(planned, said.append)[0] for e in EDITORS]
    except StoreError as error:
        return f"named: {error}"
    if said or not base:
        assert not base or 0 in steps
        return "made again"
    assert steps == [STEPS, STEPS]
    for name in (f"{e}/state/step-{STEPS:06d}.safetensors" for e in EDITORS):
        assert (out / name).read_bytes() == (uninterrupted() / name).read_bytes()
    return "nothing"


def analysed(out: Path, whole: Run) -> str:
    """What the analysis does: names what is damaged, notes what is missing, or reads what was written."""
    try:
        run = load_run(out)
    except BadRun as error:
        return f"named: {error}"
    if set(run.notes) - set(whole.notes):
        return "noted"
    assert run.manifest == whole.manifest
    for name in EDITORS:
        assert run.editors[name].records.equals(whole.editors[name].records)
        assert run.editors[name].reports.equals(whole.editors[name].reports)
        assert run.editors[name].base.equals(whole.editors[name].base)
    assert run.events.equals(whole.events)
    assert run.questions.equals(whole.questions)
    return "nothing"


def test_a_hundred_random_damages_are_noticed(tmp_path: Path) -> None:
    """What is silently taken is equal to what was written: damage in a file that is made anew or not read at all."""
    at, planned, whole = random.Random(0), expected(), load_run(uninterrupted())
    for n in range(TIMES):
        name = at.choice(written())
        out = tmp_path / str(n)
        shutil.copytree(uninterrupted(), out, ignore=shutil.ignore_patterns("figures", "tables", "hard", "report.html"))
        kind = damage(out / name, at)
        read, went = analysed(out, whole), resumed(out, planned)
        if name.startswith("base/"):
            assert (went, kind) == ("made again", kind), name
        elif name == "manifest.json":
            assert went.startswith("named"), (name, kind)
        elif name.startswith(EDITORS):
            assert went == "made again", (name, kind)
        if name.endswith((".parquet", ".json", ".jsonl")) and not name.startswith(("schedule", *(f"{e}/monitors" for e in EDITORS))):
            assert read != "nothing" or name == "summary.json", (name, kind)
        shutil.rmtree(out)


def test_the_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    import hashlib

    whole = uninterrupted()
    for name in written():
        sums = [line.partition("  ")[0] for line in (whole / SUMS).read_text().splitlines() if line.endswith(f"  {name}")]
        if sums:
            assert [hashlib.sha256((whole / name).read_bytes()).hexdigest()] == sums, name
            assert not is_damaged(whole / name)


def test_lost_sums_are_missed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(uninterrupted(), out)
    (out / SUMS).unlink()
    with pytest.raises(StoreError, match="SHA256SUMS is missing"):
        RunFolder(out).manifest()
    with pytest.raises(BadRun, match="SHA256SUMS is missing"):
        load_run(out)


def test_a_line_cut_by_a_kill_is_no_damage_and_a_changed_one_is(tmp_path: Path) -> None:
    lines = (uninterrupted() / EDITORS[0] / "edits.jsonl").read_bytes()
    path = tmp_path / "edits.jsonl"
    path.write_bytes(lines[:-9])
    rows, damaged = read_lines(path)
    assert (len(rows), damaged) == (STEPS - 1, [])
    path.write_bytes(lines.replace(b'"step": 3}', b'"step": 7}'))
    rows, damaged = read_lines(path)
    assert (len(rows), damaged) == (STEPS - 1, [3])
    assert [r["step"] for r in rows] == [*chain(range(1, 3), range(4, STEPS + 1))]
