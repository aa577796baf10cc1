"""Editors of one run side by side, each worker a process of its own.

An editor depends on no other one, so that its answers are the same whether it runs alone or beside others. A worker opens the run
folder as a resumed run does, takes one editor after the other, and tells its progress and its notes to the process of the run, which
alone shows them and writes the manifest. A worker ends when that process ends, however it ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from typing import Any

import psutil
import torch

from testbed.experiment.command import user_errors
from testbed.experiment.interrupt import Stopped, StopRequest
from testbed.model.handle import ModelHandle

_POLL_SECONDS = 0.2
"""Longest time until a requested stop is passed on."""
_OWN_BYTES, _MODEL_COPIES = 1.5e9, 3.0
"""Memory of a worker: its libraries and data, and so many times the model, for its weights, activations and an editor's state."""
_DIED = "a process that ran an editor ended with code {}; what was saved is kept, go on with --resume"


RunOne = Callable[[str, Callable[..., None]], None]
"""Takes the name of an editor and a callback for its progress."""
Opened = Callable[[Callable[[str], None], StopRequest], RunOne]


@dataclass(frozen=True)
class WorkerMessages:
    """What the process of the run does with the messages of workers.

    note: a line for the user. progress: an editor, edits made, edits in all, and the success right after the step.
    """

    note: Callable[[str], None]
    progress: Callable[..., None]


def workers(asked: int, editors: int, handle: ModelHandle) -> tuple[int, str]:
    """How many workers a run takes, at most one for each editor, and why they are fewer than asked for; "" where they are not."""
    most = min(asked, editors)
    if most < 2:
        return 1, ""
    if handle.device.type != "cpu":
        return 1, f"one editor at a time, because the model is on {handle.device}"
    size = sum(p.numel() * p.element_size() for p in handle.model.parameters())
    each, free = _OWN_BYTES + _MODEL_COPIES * size, psutil.virtual_memory().available
    fit = min(most, max(1, int(free / each)))
    why = f"{fit} of {most} editors at a time, because each takes about {each / 1e9:.1f} GB and {free / 1e9:.1f} GB are free"
    return fit, why if fit < most else ""


class _SharedStop(StopRequest):
    """A request to stop that the process of the run makes."""

    def __init__(self, event: Event) -> None:
        self._event = event

    @property
    def requested(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._event.is_set()

    def request(self) -> None:
        self._event.set()


def run_side_by_side(opened: Opened, names: Sequence[str], jobs: int, stop: StopRequest, messages: WorkerMessages) -> None:
    """Run the editors of a prepared run folder in `jobs` processes.

    The last names begin first: lists begin with bounds and light baselines, which then fill the gaps at the end.
    opened: opens the folder in a worker, from a callback for notes and the request to stop; a function that can be pickled.

    After an error of one editor, and after a requested stop, the others end behind the step in hand, with everything saved; then the
    error, or `Stopped`, is raised.
    """
    spawn = multiprocessing.get_context("spawn")  # a forked process could not use OpenMP
    event, left, failures = spawn.Event(), list(reversed(names)), list[Exception]()
    with _started(spawn, jobs, (opened, event, torch.get_num_threads())) as running:
        while running:
            if stop.requested or failures:
                event.set()
            ready = wait(list(running), _POLL_SECONDS)
            for connection in [c for c in running if c in ready]:
                kind, content = _received(connection)
                if kind == "note":
                    messages.note(content)
                elif kind == "progress":
                    messages.progress(*content)
                elif kind == "next":
                    with suppress(OSError):  # of a worker that has died meanwhile, the end is received next
                        connection.send(left.pop(0) if left and not event.is_set() else None)
                elif kind == "failed":
                    failures.append(_error_of(*content))
                elif kind == "ended":
                    process = running.pop(connection)
                    process.join()
                    if process.exitcode:
                        failures.append(RuntimeError(_DIED.format(process.exitcode)))
    _raise_first(failures, left, stop)


def _received(connection: Connection) -> tuple[str, Any]:
    """The next message of a worker; of one that died, that it ended."""
    try:
        return connection.recv()
    except (EOFError, OSError):
        return "ended", None


def _raise_first(failures: Sequence[Exception], left: Sequence[str], stop: StopRequest) -> None:
    """An error comes before the stops that it caused."""
    for failure in sorted(failures, key=lambda e: isinstance(e, Stopped)):
        raise failure
    if left and stop.requested:
        raise Stopped(f"stopped before {left[0]}")


@contextmanager
def _started(spawn: Any, jobs: int, arguments: tuple[Opened, Event, int]) -> Iterator[dict[Connection, BaseProcess]]:
    """Workers by the connection to each; those that still run at the end of the block are ended."""
    running: dict[Connection, BaseProcess] = {}
    try:
        for _ in range(jobs):
            here, there = spawn.Pipe()
            process = spawn.Process(target=_work, args=(there, *arguments))
            process.start()
            there.close()
            running[here] = process
        yield running
    finally:
        for process in running.values():
            process.kill()
            process.join()


def _work(connection: Connection, opened: Opened, stop: Event, threads: int) -> None:
    """A worker: editors from the process of the run, one after the other, until there are none."""
    _end_with_the_run()
    torch.set_num_threads(threads)  # rounding depends on it
    for number in (signal.SIGINT, signal.SIGTERM):  # the process of the run gets them too, and decides
        signal.signal(number, signal.SIG_IGN)
    try:
        run_one = opened(lambda line: connection.send(("note", line)), _SharedStop(stop))
        while (name := _next(connection)) is not None:
            run_one(name, lambda *now, name=name: connection.send(("progress", (name, *now))))
    except Exception as e:
        connection.send(("failed", _described(e)))
    connection.send(("ended", None))


def _next(connection: Connection) -> str | None:
    connection.send(("next", None))
    return connection.recv()


def _end_with_the_run() -> None:
    """Let this process end as soon as the one that started it has, even where that was killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _described(error: Exception) -> tuple[str, str]:
    """The kind and the message of an error that the user can mend or of a stop, else no kind and the traceback."""
    kind = next((k.__name__ for k in type(error).__mro__ if k in (*user_errors(), Stopped)), "")
    return kind, str(error) if kind else "".join(traceback.format_exception(error))


def _error_of(kind: str, message: str) -> Exception:
    """The error that a worker described."""
    return {k.__name__: k for k in (*user_errors(), Stopped)}.get(kind, RuntimeError)(message)
