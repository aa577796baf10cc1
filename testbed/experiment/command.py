"""The end of every command line: a mistake of the user is a plain line instead of a traceback, and the exit code gives the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from rich.console import Console

from streams.base import BadStream
from testbed.benchmarks.files import BadBenchmark
from testbed.core.events import BadEvent, BadPicture
from testbed.core.plugins import BadPlugin
from testbed.core.registry import UnknownName
from testbed.core.terminal import replace_what_the_terminal_lacks
from testbed.experiment.config import BadConfig
from testbed.experiment.interrupt import Stopped
from testbed.storage.files import StoreError

T = TypeVar("T")
TERMINATED = 143
"""Exit code of a run that SIGTERM ended: 128 and the number of the signal, as in a shell."""


def run_command(work: Callable[[], T], resume_with: str = "--resume and the run folder") -> tuple[int, T | None]:
    """Do the work of a command line; return the exit code, and the result where it is 0.

    Exit code 2 is a mistake of the user or lack of memory, 130 an interrupt, 143 a stop by SIGTERM.
    resume_with: how the user continues interrupted work, for the message.
    """
    replace_what_the_terminal_lacks()
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
        console.print(f"interrupted; what was saved is kept. Go on with {resume_with}.", markup=False)
        return 130, None


def user_errors() -> tuple[type[Exception], ...]:
    """Errors that the user can mend."""
    from analysis.reading.records import BadRun  # imported here: these modules load torch and pandas, and --help needs neither
    from testbed.editors.base import BadEditor
    from testbed.model.families import UnknownLayout
    from testbed.model.handle import BadModel
    from testbed.model.out_of_memory import MEMORY_ERRORS

    own = (BadConfig, BadPlugin, BadStream, BadEvent, BadPicture, BadBenchmark, BadEditor, BadRun, BadModel)
    return (*own, *MEMORY_ERRORS, UnknownLayout, UnknownName, StoreError)
