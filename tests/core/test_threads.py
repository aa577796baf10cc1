"""Threads on a busy machine: chosen by the free cores, kept by a run that goes on, and left alone where the user chose."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.core import threads


def prepared(*, load: float, cores: int = 4, given: int | None = None, **environment: str) -> tuple[str, dict[str, str]]:
    """(line, OpenMP's environment afterwards) in a fresh process with this load."""
    code = (
        "import json, os, sys; from testbed.core import threads\n"
        f"threads.free_cores = lambda: ({cores}, {load})\n"
        f"line = threads.prepare({given})\n"
        "print(json.dumps([line, {k: v for k, v in os.environ.items() if k.startswith('OMP_')}]))"
    )
    clean = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    done = subprocess.run([sys.executable, "-c", code], env={**clean, **environment}, capture_output=True, text=True, check=True)
    line, found = json.loads(done.stdout)
    return line, found


@pytest.mark.parametrize(("load", "chosen"), [(0.0, 4), (0.4, 4), (1.2, 3), (3.0, 1), (9.0, 1)])
def test_free_cores_are_taken_and_waiting_threads_sleep(load: float, chosen: int) -> None:
    line, found = prepared(load=load)
    assert found == {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(chosen)}
    assert (line == "") == (chosen == 4) and (chosen == 4 or line.startswith(f"threads: {chosen} of 4"))


def test_a_user_who_chose_is_left_alone_and_a_run_goes_on_as_it_began() -> None:
    assert prepared(load=9.0, OMP_NUM_THREADS="3", OMP_WAIT_POLICY="ACTIVE") == ("", {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "ACTIVE"})
    line, found = prepared(load=0.0, given=2)
    assert found["OMP_NUM_THREADS"] == "2" and "as when the run began" in line


def test_nothing_happens_where_torch_is_loaded_and_importing_changes_no_environment() -> None:
    before = dict(os.environ)
    import torch  # noqa: F401

    assert threads.prepare() == "" and dict(os.environ) == before
    code = "import os; before = dict(os.environ); import testbed, testbed.run, testbed.ask; assert dict(os.environ) == before"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_cores_that_are_busy_now_are_counted_and_not_those_of_the_last_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 40 ticks on 4 cores 10 are idle and 10 wait for a disk: two cores are busy."""
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 50 800 50 0 0 0 0 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    monkeypatch.setattr(threads, "_STAT", stat)
    monkeypatch.setattr(threads.time, "sleep", lambda s: stat.write_text("cpu  115 0 55 810 60 0 0 0 0 0\n"))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert threads.free_cores()[1] == pytest.approx(2.0)
    monkeypatch.setattr(threads, "_STAT", tmp_path / "none")
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 0.0, 0.0))
    assert threads.free_cores()[1] == 1.5


def test_the_machine_has_cores() -> None:
    cores, load = threads.free_cores()
    assert cores >= 1 and load >= 0
