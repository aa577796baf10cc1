"""Where the seconds go: pieces of work name themselves, and whoever listens gets wall time by name.

Stages do not nest: inside one, those that it calls count for it. Nobody listening, a stage costs next to nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

NOTE = "seconds_"
"""How notes of a report that are seconds of a stage begin."""


class Listener:
    """Seconds by stage so far, and the stage that is running."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.now: str | None = None
        self._since = 0.0

    def turn(self, name: str | None) -> None:
        """End the running stage, if any, and begin another; None begins none. Waits for a GPU, whose work counts where it was asked for."""
        torch = sys.modules.get("torch")  # without torch no GPU works
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        clock = time.perf_counter()
        if self.now is not None:
            self.seconds[self.now] = self.seconds.get(self.now, 0.0) + clock - self._since
        self.now, self._since = name, clock


_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def collected() -> Iterator[dict[str, float]]:
    """Inside, seconds are kept by stage; complete when it ends. One inside another hides what it hears from the outer."""
    listener = Listener()
    token = _LISTENER.set(listener)
    try:
        yield listener.seconds
    finally:
        listener.turn(None)
        _LISTENER.reset(token)


@contextmanager
def stage(name: str) -> Iterator[Callable[[str], None]]:
    """A piece of work, as a context or a decorator. What it gives begins another stage in this one's place."""
    listener = _LISTENER.get()
    if listener is None or listener.now is not None:
        yield lambda other: None
        return
    listener.turn(name)
    try:
        yield listener.turn
    finally:
        listener.turn(None)


def running() -> str | None:
    """The stage that is running, where somebody listens."""
    listener = _LISTENER.get()
    return listener.now if listener is not None else None
