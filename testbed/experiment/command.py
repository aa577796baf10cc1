"""How a command line ends: what is a user's to mend is told in plain words, and the exit code says which way it went."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rich.console import Console

from streams.base import BadStream
from testbed.core.events import BadEvent, BadPicture
from testbed.core.registry import UnknownName
from testbed.experiment.config import BadConfig
from testbed.experiment.interrupt import Stopped
from testbed.storage.files import StoreError

T = TypeVar("T")
TERMINATED = 143
"""Exit code of a run that SIGTERM ended: 128 and the signal's number, as a shell has it."""


def run_command(work: Callable[[], T], go_on: str = "--resume and the run folder") -> tuple[int, T | None]:
    """An exit code (as `main`'s; a mistake of the user's, and memory that runs out, is said in plain words), and the result.

    go_on: with what work that was interrupted goes on.
    """
    console = Console(stderr=True)
    try:
        return 0, work()
    except user_errors() as e:
        for line in str(e).splitlines():
            console.print(f"error: {line}", style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 2, None
    except Stopped as e:
        console.print(str(e), markup=False, highlight=False, soft_wrap=True)
        return TERMINATED, None
    except KeyboardInterrupt:
        console.print(f"interrupted; what was saved is kept. Go on with {go_on}.", markup=False)
        return 130, None


def user_errors() -> tuple[type[Exception], ...]:
    """What is a user's to mend, and so is told in one line and not as a traceback."""
    from analysis.reading.records import BadRun
    from testbed.benchmarks.files import BadBenchmark
    from testbed.editors.base import BadEditor
    from testbed.model.families import UnknownLayout
    from testbed.model.handle import BadModel
    from testbed.model.out_of_memory import MEMORY_ERRORS

    streams = (BadStream, BadEvent, BadPicture, BadBenchmark)
    return (BadConfig, *streams, BadEditor, BadRun, BadModel, *MEMORY_ERRORS, UnknownLayout, UnknownName, StoreError)
