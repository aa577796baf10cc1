"""Opt-in (`pytest -m soak`): thousands of edits, killed at a hundred instants, equal to the run that was left alone.

TESTBED_SOAK_EDITS (10,000), TESTBED_SOAK_KILLS (100) and TESTBED_SOAK_LOG (a file for the log) change its size and
where it writes what happened.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.models import folder
from tests.helpers.resumed_runs import EDITORS, assert_same
from tests.helpers.warm_process import Done, command

EDITS, KILLS = (int(os.environ.get(f"TESTBED_SOAK_{name}", n)) for name, n in (("EDITS", "10000"), ("KILLS", "100")))
EVERY = 20
"""Edits between saved states: what a kill can cost at most."""
PHASES = ("apply", "probe", "write", "rename", "resume", "term")
"""Where a process ends: SIGKILL as one of these begins; `term` is SIGTERM in the middle of a batch."""
QUICK = ("--set", "finetune.steps=1", "balancedit.steps=1", "--probe-budget", 10, "--max-new-tokens", 1, "--device", "cpu")


def start(out: Path, kill: str = "") -> Done:
    size = ("--stream", "world-yearly", "--model", folder("gpt2"), "--editor", ",".join(EDITORS), "--edits", EDITS)
    return command(*size, *QUICK, "--save-every", EVERY, "--out", out, "--log", out.with_suffix(".log"), kill=kill, figures=False)


def go_on(out: Path, kill: str = "") -> Done:
    return command("--resume", out, "--save-every", EVERY, "--log", out.with_suffix(".log"), kill=kill, figures=False)


def instants() -> list[tuple[str, str]]:
    """Phase and place of each kill, in the order in which a run comes to them: first through one editor, then the other."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(KILLS):
        second, of_editor = divmod(i, -(-KILLS // 2))
        step = 1 + int((of_editor + rng.random()) * (EDITS - EVERY) / -(-KILLS // 2))
        phase = PHASES[i % len(PHASES)]
        place = {"write": f"write {step}+", "rename": f"rename {step}+", "resume": "resume 0", "term": f"apply {step} term"}
        out.append((phase, place.get(phase, f"{phase} {step}") + (" again" if second and phase == "resume" else "")))
    return out


@pytest.mark.soak
def test_a_long_run_killed_at_many_instants_equals_the_one_left_alone(tmp_path: Path) -> None:
    log = Path(os.environ.get("TESTBED_SOAK_LOG", tmp_path / "soak.log"))
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert start(whole).code == 0
    met: Counter[str] = Counter()
    with log.open("w", encoding="utf-8") as written:
        for i, (phase, kill) in enumerate(instants(), 1):
            done = go_on(out, kill) if (out / "manifest.json").exists() else start(out, kill)
            newest = {e: max((p.name for p in (out / e / "state").glob("step-*")), default="nothing") for e in EDITORS}
            print(f"{i} of {KILLS}: ended at '{kill}' with {done.code}; saved: {newest}", file=written, flush=True)
            assert done.code == (143 if phase == "term" else -9), done.err
            assert not (out / "summary.json").exists()
            met[phase] += 1
        done = go_on(out)
        print(f"went on to the end with {done.code}; kills by phase: {dict(met)}", file=written)
        assert done.code == 0, done.err
        assert_same(out, whole)
        print(f"equal to the run left alone: {EDITS} edits by each of {', '.join(EDITORS)}", file=written)
    assert set(met) == set(PHASES[:KILLS])
