"""Progress of long work on standard error: a live bar in a terminal, a line a minute elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import partial

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

LINE_SECONDS = 60.0
"""Seconds between two lines where the output is no terminal."""


class _Speed(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "", style="cyan")


class Bars:
    """Named bars; `advance` moves one to an absolute count, with the current success beside it."""

    def __init__(self, progress: Progress, lines: Callable[[str], None] | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """lines: prints a line, where the output is no terminal."""
        self._progress, self._lines, self._clock = progress, lines, clock
        self._tasks: dict[str, object] = {}
        self._since: dict[str, tuple[float, int]] = {}
        self._printed = clock()

    def advance(self, name: str, done: int, total: int, success: float | None = None) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, success="")
        shown = {} if success is None else {"success": f"success {self._average(name, success):.0%}"}
        self._progress.update(self._tasks[name], completed=done, total=total, **shown)  # type: ignore[arg-type]
        self._print(name, done, total)

    def _print(self, name: str, done: int, total: int) -> None:
        """A line about this bar, if none was printed for a minute: what is done, the rate, the success, the time left."""
        now = self._clock()
        start, first = self._since.setdefault(name, (now, done))
        if self._lines is None or now - self._printed < LINE_SECONDS:
            return
        self._printed = now
        rate = (done - first) / (now - start) if now > start else 0.0
        success = self._tasks.get(f"{name}/success")
        parts = [f"{name}: {done:,} of {total:,}", f"{rate:.2g}/s"]
        parts += [f"success {success:.0%}"] if isinstance(success, float) else []
        parts += [f"{timedelta(seconds=round((total - done) / rate))} left"] if rate else []
        self._lines(", ".join(parts))

    def _average(self, name: str, value: float) -> float:
        """Moving average over about twenty steps."""
        key = f"{name}/success"
        old = self._tasks.get(key)
        new = value if not isinstance(old, float) else 0.95 * old + 0.05 * value
        self._tasks[key] = new
        return new


_SHOWN: ContextVar[Bars | None] = ContextVar("shown", default=None)


@contextmanager
def bars(lines: Callable[[str], None] | None = None) -> Iterator[Bars]:
    """Bars on standard error, gone when the work is done; inside other bars, one more line among them. Where standard error is no
    terminal, a line is printed at most once a minute.

    lines: takes these lines in the place of standard error, which shows nothing then.
    """
    outer = _SHOWN.get()
    if outer is not None:
        yield outer
        return
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:>16}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TextColumn("{task.fields[success]}"),
        TimeRemainingColumn(),
    )
    live = console.is_terminal and lines is None
    if lines is None and not live:
        lines = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    with Progress(*columns, console=console, disable=not live) as progress:
        shown = Bars(progress, lines)
        token = _SHOWN.set(shown)
        try:
            yield shown
        finally:
            _SHOWN.reset(token)
