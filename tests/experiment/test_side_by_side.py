"""Editors in processes of their own give the answers of editors one after the other; stops, errors and deaths lose nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from testbed.core import threads
from testbed.editors.base import BadEditor
from testbed.experiment import side_by_side
from testbed.experiment.config import RunConfig
from testbed.experiment.interrupt import Stopped, StopRequest
from testbed.experiment.runner import study
from testbed.experiment.side_by_side import workers
from testbed.model.handle import BadModel
from testbed.model.loading import load
from tests.helpers.models import folder
from tests.helpers.resumed_runs import EDITORS, FAST, SMALL, assert_same

SETTINGS = tuple(str(FAST[i]) for i in range(1, len(FAST), 2))


def config(out: Path, *editors: str, **more: Any) -> RunConfig:
    """The run of `tests.helpers.resumed_runs`, two editors at a time."""
    own = {"jobs": 2, "model": str(folder("llava")), "device": "cpu", "edits": 20, "save_every": 5, "max_new_tokens": 2, "probe_budget": 10}
    return RunConfig(out=out, editor=editors or EDITORS, set=SETTINGS, **{**own, **more})


@cache
def whole() -> Path:
    """The same run, one editor after the other, with one thread as every test has."""
    out = Path(mkdtemp(prefix="whole-")) / "run"
    study(config(out, jobs=1))
    return out


def assert_as_whole(out: Path) -> None:
    """All but the order of notes, which is that of the time."""
    assert_same(out, whole(), said=True)
    here, there = (json.loads((folder / "manifest.json").read_text())["notes"] for folder in (out, whole()))
    assert sorted(line for line in here if "(--jobs)" not in line) == sorted(there)
    assert any("(--jobs)" in line for line in here)


def workers_of(pid: int) -> list[psutil.Process]:
    """The processes that a process started for editors."""
    return [p for p in psutil.Process(pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]


def test_answers_states_and_sums_are_those_of_one_editor_after_the_other(tmp_path: Path) -> None:
    said: list[str] = []
    study(config(tmp_path / "run"), said.append)
    assert_as_whole(tmp_path / "run")
    assert any(line.startswith("2 editors at a time, each in a process of its own (--jobs)") for line in said)
    check = ["sha256sum", "--check", "--ignore-missing", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=tmp_path / "run", capture_output=True).returncode == 0


@pytest.mark.ci
def test_an_error_of_one_editor_is_raised_when_the_others_have_saved(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(BadModel, match="layer 99 does not exist"):
        study(config(out, "noop", "finetune[layer=99]", "balancedit"))
    assert not workers_of(os.getpid())
    assert list((out / "balancedit" / "state").glob("step-*.safetensors"))
    assert not (out / "noop").exists()


@pytest.mark.ci
def test_a_requested_stop_reaches_every_editor(tmp_path: Path) -> None:
    stop, out = StopRequest(), tmp_path / "run"

    def say(line: str) -> None:
        if line.startswith("2 editors at a time"):
            stop.request()

    with pytest.raises(Stopped, match=f"everything up to there is saved. Go on with --resume {out}"):
        study(config(out), say, stop)
    study(replace(config(out), out=None, resume=out))
    assert_as_whole(out)


@pytest.mark.ci
def test_workers_end_with_a_run_that_is_killed_and_it_goes_on(tmp_path: Path) -> None:
    out, command = tmp_path / "run", [sys.executable, "-m", "testbed.run"]
    begin = [*command, "--model", folder("llava"), "--out", out, *SMALL, *FAST, "--jobs", 2]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([str(x) for x in begin], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=alone)
    late = time.monotonic() + 240
    while not list(out.glob("*/state/step-*")):
        assert time.monotonic() < late and run.poll() is None
        time.sleep(0.05)
    inside = workers_of(run.pid)
    assert len(inside) == 2
    run.send_signal(signal.SIGKILL)
    run.wait()
    _, alive = psutil.wait_procs(inside, timeout=20)
    assert not alive, "a worker outlives its run"
    resumed = subprocess.run([*command, "--resume", str(out), "--jobs", "2"], capture_output=True, env=alone, timeout=240)
    assert resumed.returncode == 0, resumed.stderr
    assert_as_whole(out)


def test_there_are_no_more_workers_than_editors_memory_and_a_cpu_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = load(str(folder("llama")))
    assert workers(0, 7, handle) == workers(1, 7, handle) == workers(4, 1, handle) == (1, "")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100e9))
    assert workers(4, 7, handle) == (4, "")
    assert workers(9, 3, handle) == (3, "")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3.2e9))
    n, line = workers(4, 7, handle)
    assert (n, line) == (2, "2 of 4 editors at a time, because each takes about 1.5 GB and 3.2 GB are free")
    away: Any = SimpleNamespace(device=SimpleNamespace(type="cuda"), model=handle.model)
    assert workers(2, 7, away)[0] == 1


def test_cores_are_shared_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "free_cores", lambda: (8, 1.0))
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k != "torch"})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert (threads.processes(3), threads.processes(20)) == (3, 7)
    threads.prepare(None, 3)
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_an_error_of_the_user_and_a_stop_arrive_as_they_are() -> None:
    arrived = [side_by_side._error_of(*side_by_side._described(e)) for e in (BadEditor("no layer 99"), Stopped("stopped after step 3"))]
    assert [(type(e), str(e)) for e in arrived] == [(BadEditor, "no layer 99"), (Stopped, "stopped after step 3")]


def test_an_error_of_a_kind_that_the_user_can_mend_stays_of_that_kind() -> None:
    class NoSuchLayer(BadEditor):
        """One of its kinds, as a plug-in may have."""

    arrived = side_by_side._error_of(*side_by_side._described(NoSuchLayer("no layer 99")))
    assert (type(arrived), str(arrived)) == (BadEditor, "no layer 99")


def test_any_other_error_arrives_with_its_traceback() -> None:
    try:
        raise ZeroDivisionError("what went wrong")
    except ZeroDivisionError as e:
        other = side_by_side._error_of(*side_by_side._described(e))
    assert type(other) is RuntimeError
    assert "in test_any_other_error" in str(other) and str(other).endswith("ZeroDivisionError: what went wrong\n")
