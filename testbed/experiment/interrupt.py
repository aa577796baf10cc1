"""A run that is asked to end does so between two batches, with everything saved that was finished."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(RuntimeError):
    """A run ended where it was asked to; the message says how to go on."""


class Stop:
    """Whether the run was asked to end. It looks after each batch, and ends where it stands saved."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self, *_: Any) -> None:
        """Ask the run to end after the batch it is at."""
        self.asked = True

    @contextmanager
    def on(self, number: int = signal.SIGTERM) -> Iterator[None]:
        """Inside, the signal asks; a second one ends the process at once, as it does outside. For a main thread."""

        def first(*_: Any) -> None:
            self.ask()
            signal.signal(number, before)

        before = signal.signal(number, first)
        try:
            yield
        finally:
            signal.signal(number, before)
