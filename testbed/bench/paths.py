"""Two paths of one method, measured side by side: as it is, and plain (one edit at a time, the whole model at every step, no cache).

The plain path is the method's own code inside `testbed.bench.reference.whole_model`, with everything kept on the handle
dropped before each edit. Nothing but speed may differ: the losses of every training step are compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor

from streams.base import Stream
from testbed.core.events import EditBatch, EditEvent
from testbed.editors.base import Editor
from testbed.model.handle import ModelHandle
from testbed.bench.reference import recorded_losses, whole_model

Make = Callable[[], Editor]
"""A fresh editor."""


@dataclass(frozen=True)
class Paths:
    """Edits a second (on a CPU: a CPU second, in which neighbours do not count) of three ways to make the same first
    edits, and how far their losses lie apart."""

    model: str
    editor: str
    plain_per_second: float
    fast_per_second: float
    """One edit at a time."""
    batch_per_second: float | None
    """`batch` edits trained at once; absent where the method takes fewer."""
    batch: int
    loss_difference: float | None
    """Largest difference of a loss between the plain path and the fast one, over all edits and steps; absent where none is watched."""
    batch_loss_difference: float | None
    """The same for edits trained at once; absent where a batch is one problem, not many."""

    @property
    def ratio(self) -> float:
        return self.fast_per_second / self.plain_per_second

    @property
    def batch_ratio(self) -> float | None:
        return self.batch_per_second / self.plain_per_second if self.batch_per_second else None


def paths(handle: ModelHandle, stream: Stream, make: Make, edits: int = 4, batch: int = 16) -> Paths:
    """Measure one editor on the stream's first new facts: `edits` of them plainly, 4 times as many fast, `batch` at once."""
    events = [e for e in stream.events(8 * max(edits, batch)) if e.kind == "add"]
    slow, slow_losses = run_steps(handle, stream, make(), [[e] for e in events[:edits]], whole=True)
    fast, fast_losses = run_steps(handle, stream, make(), [[e] for e in events[: 4 * edits]])
    together, batch_losses, most = None, [], make().traits.max_batch
    if most is None or most >= batch:
        many = events[: 2 * batch]
        together, batch_losses = run_steps(handle, stream, make(), [many[:batch], many[batch:]])
    traits = make().traits
    alone = traits.gated and traits.undo  # what can be undone one by one was trained one by one
    return Paths(
        handle.name,
        make().name,
        slow,
        fast,
        together,
        batch,
        apart(slow_losses, fast_losses),
        apart(slow_losses, _rows(batch_losses, batch)) if alone else None,
    )


def clock_of(handle: ModelHandle) -> Callable[[], float]:
    """CPU seconds where the model runs on a CPU, in which neighbours do not count; else wall time."""
    return time.process_time if handle.device.type == "cpu" else time.perf_counter


def run_steps(
    handle: ModelHandle, stream: Stream, editor: Editor, steps: Sequence[Sequence[EditEvent]], whole: bool = False
) -> tuple[float, list[list[Tensor]]]:
    """Edits a second, and the losses (B,) of every training step of every step of the stream."""
    editor.prepare(handle, stream.train_pool())
    handle.cache.clear()
    clock = clock_of(handle)
    seconds, losses = 0.0, []
    for n, events in enumerate(steps, 1):
        if whole:
            handle.cache.clear()
        batch = EditBatch(tuple(events), n, {e.id: stream.paraphrases(e) for e in events})
        with whole_model(handle) if whole else nullcontext(), recorded_losses() as seen:
            start = clock()
            editor.apply(batch)
            seconds += clock() - start
        losses.append(list(seen))
    return sum(map(len, steps)) / seconds, losses


def _rows(losses: list[list[Tensor]], batch: int) -> list[list[Tensor]]:
    """The losses of edits trained at once, edit by edit."""
    return [[x[i : i + 1] for x in seen] for seen in losses for i in range(batch) if seen and i < len(seen[0])]


def apart(one: list[list[Tensor]], other: list[list[Tensor]]) -> float | None:
    """The largest difference over the edits and steps that both have; None where nothing was watched."""
    pairs = [(a, b) for seen, also in zip(one, other) for a, b in zip(seen, also)]
    return max((float((a.float() - b.float()).abs().max()) for a, b in pairs), default=None)
