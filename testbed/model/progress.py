"""A live bar for long work; silent where output is not a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class _Speed(ProgressColumn):
    """Units a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.1f}/s" if speed else "", style="cyan")


class Bars:
    """Named bars; `advance` moves one to an absolute count, with the current success beside it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, object] = {}

    def advance(self, name: str, done: int, total: int, success: float | None = None) -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, success="")
        shown = {} if success is None else {"success": f"success {self._average(name, success):.0%}"}
        self._progress.update(self._tasks[name], completed=done, total=total, **shown)  # type: ignore[arg-type]

    def _average(self, name: str, value: float) -> float:
        """Moving average over about twenty steps."""
        key = f"{name}/success"
        old = self._tasks.get(key)
        new = value if not isinstance(old, float) else 0.95 * old + 0.05 * value
        self._tasks[key] = new
        return new


_SHOWN: ContextVar[Bars | None] = ContextVar("shown", default=None)


@contextmanager
def bars() -> Iterator[Bars]:
    """Bars on standard error, gone when the work is done; inside other bars, one more line among them."""
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
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        shown = Bars(progress)
        token = _SHOWN.set(shown)
        try:
            yield shown
        finally:
            _SHOWN.reset(token)
