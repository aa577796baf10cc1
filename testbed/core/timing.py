# pyright: strict
"""Wall time by named section: a piece of work names itself, and a collector around it sums seconds by name.

Sections do not nest: what a section calls counts for the section, whatever it is named itself. Without a collector a
section costs next to nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar

NOTE_PREFIX = "seconds_"
"""Prefix of those notes of an edit report that are the seconds of a section."""


class _Stopwatch:
    """Seconds by section so far, and the name of the running section."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.section: str | None = None
        self._since = 0.0

    def switch(self, section: str | None) -> None:
        """End the running section, if any, and start another (None starts none).

        The GPU is synchronised first, because its work must count for the section that launched it.
        """
        torch = sys.modules.get("torch")  # a process that never imported torch has launched no work
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.section is not None:
            self.seconds[self.section] = self.seconds.get(self.section, 0.0) + now - self._since
        self.section, self._since = section, now


_STOPWATCH: ContextVar[_Stopwatch | None] = ContextVar("stopwatch", default=None)


@contextmanager
def collect_seconds() -> Generator[dict[str, float]]:
    """Collect seconds by section inside the block; the mapping is complete when the block ends.

    A collector inside another one keeps what it collects from the outer one.
    """
    stopwatch = _Stopwatch()
    token = _STOPWATCH.set(stopwatch)
    try:
        yield stopwatch.seconds
    finally:
        stopwatch.switch(None)
        _STOPWATCH.reset(token)


@contextmanager
def timed(section: str) -> Generator[Callable[[str], None]]:
    """Name a piece of work, as a context or a decorator; calling what the context gives switches to another section."""
    stopwatch = _STOPWATCH.get()
    if stopwatch is None or stopwatch.section is not None:
        yield lambda other: None
        return
    stopwatch.switch(section)
    try:
        yield stopwatch.switch
    finally:
        stopwatch.switch(None)
