"""Requested stops: a run ends after the step in hand, with everything saved."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


class Stopped(RuntimeError):
    """A run ended after a requested stop; the message says how to resume."""


class StopRequest:
    """A flag that a run checks after each step; once it is set, the run saves and raises `Stopped`."""

    def __init__(self) -> None:
        self.requested = False

    def request(self) -> None:
        """Set the flag."""
        self.requested = True

    def check(self, where: str) -> None:
        """Raise `Stopped` with the message `where` when the flag is set."""
        if self.requested:
            raise Stopped(where)

    @contextmanager
    def on_signal(self, number: int = signal.SIGTERM) -> Generator[None]:
        """Set the flag at the first signal inside the block; a second one has its former effect. For the main thread."""

        def first(*_: Any) -> None:
            self.request()
            signal.signal(number, former)

        former = signal.signal(number, first)
        try:
            yield
        finally:
            signal.signal(number, former)
