"""Command lines in real processes without paying for the imports each time.

One process imports everything and then forks for every command; a command can kill itself with
SIGKILL at an exact place, so that no test has to race a clock.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import analysis.reporting.report

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """How a command ended: `code` is negative for the signal that killed it."""

    code: int
    out: str
    err: str


@cache
def _server() -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=tempfile.gettempdir())
    atexit.register(_end, process)
    return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def command(*argv: Any, name: str = "run", kill: str = "", figures: bool = True, cwd: Path | None = None) -> Done:
    """`testbed NAME ARGV` in a process of its own.

    kill: "apply 4 adam 3" ends it without warning at the third optimiser step of the fourth `apply`;
        "probe 6 generate 1" in the first generation after step 6; "rename 10" between the writing and the
        renaming of the first file of step 10 ("rename 10 again": of the second); "resume 0" when it goes on;
        "rename 10+" at the first of step 10 or later; "apply 7 term" sends it SIGTERM there, which it may answer.
    figures: without them a report takes half a second.
    """
    server = _server()
    with tempfile.TemporaryDirectory() as tmp:
        out, err = Path(tmp) / "out", Path(tmp) / "err"
        job = {
            "argv": [name, *map(str, argv)],
            "kill": kill.split(),
            "out": str(out),
            "err": str(err),
            "cwd": str(cwd or tmp),
            "figures": figures,
        }
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return Done(code, out.read_text(), err.read_text())


def _serve() -> None:
    import torch

    import testbed.experiment.estimate
    import testbed.run
    from testbed.core.registry import EDITORS, PROBES, STREAMS

    assert analysis.reporting.report
    assert testbed.experiment.estimate
    for registry in (EDITORS, PROBES, STREAMS):
        registry.scan()
    _import_models()
    torch.set_num_threads(1)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _work(json.loads(line))
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _import_models() -> None:
    """The classes that transformers imports when a LLaVA is loaded, without loading one."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor

    assert all((AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor))


def _work(job: dict[str, Any]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["cwd"])
    code = 1
    try:
        if not job["figures"]:
            analysis.reporting.report.catalogue.draw_all = lambda context: {}
        if job["kill"]:
            _arm(job["kill"])
        from testbed.__main__ import main

        code = main(job["argv"])
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(words: list[str]) -> None:
    """Wrap the phase log so that it kills, or arms the call that kills, at this phase."""
    from testbed.experiment import runner

    phase, step, *more = words
    plain = runner.phase_log
    left = 2 if more == ["again"] else 1

    def log(path: Path | None) -> Callable[[str, int], None]:
        write = plain(path)

        def called(name: str, at: int) -> None:
            nonlocal left
            write(name, at)
            if name != phase or not (at >= int(step[:-1]) if step.endswith("+") else at == int(step)):
                return
            left -= 1
            if left == 0 and more == ["term"]:
                os.kill(os.getpid(), signal.SIGTERM)
            elif left == 0:
                _die_in(*more) if more and more != ["again"] else _die()

        return called

    runner.phase_log = log


def _die_in(call: str, count: str) -> None:
    """From now on, the `count`-th optimiser step or generation is the last thing this process does."""
    import torch
    from transformers import GenerationMixin

    owner, name = {"adam": (torch.optim.Adam, "step"), "generate": (GenerationMixin, "generate")}[call]
    plain, left = getattr(owner, name), int(count)

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            _die()
        return plain(*args, **kwargs)

    setattr(owner, name, counted)


if __name__ == "__main__":
    _serve()
