"""Locate-then-edit, measured: batches against one edit at a time on the plain path, and the solve against dense ones.

The plain path is `testbed.bench.reference.whole_model`: the whole model at every step, one edit a batch, nothing kept between them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streams.base import Stream
from testbed.core.events import EditBatch, EditEvent
from testbed.editors.base import Editor
from testbed.editors.locate.solver import NullSpace, Ridge
from testbed.editors.locate.targets import TargetTask, layer_outputs, search
from testbed.model.families import FAMILIES
from testbed.model.handle import ModelHandle
from testbed.bench.reference import CACHE_FLAGS, whole_model

_LEARNED = ("second moments", *CACHE_FLAGS)
"""What is found out once a model, in the first step, and not once a batch."""
_PLAIN = 5
"""Edits that the plain path makes; the first is not counted."""


@dataclass(frozen=True)
class Batches:
    """Edits a second, one at a time on the plain path and in one batch, and how far their targets lie apart.

    Of wall time, and (for a machine that does other work too) of CPU time, over all threads.
    """

    model: str
    editor: str
    batch: int
    plain_per_second: float
    batch_per_second: float
    plain_per_cpu_second: float
    batch_per_cpu_second: float
    target_difference: float
    """Largest |delta - delta'| / |delta| over the plain path's edits: alone and whole, against in the batch."""

    @property
    def ratio(self) -> float:
        return self.batch_per_second / self.plain_per_second

    @property
    def cpu_ratio(self) -> float:
        return self.batch_per_cpu_second / self.plain_per_cpu_second


def batches(handle: ModelHandle, stream: Stream, make: Callable[[], Editor], batch: int) -> Batches:
    """Measure one editor (a `LocateEditor`) on the stream's first new facts."""
    events = [e for e in stream.events(8 * batch) if e.kind == "add"]
    slow = _run(handle, stream, make(), [[e] for e in events[:_PLAIN]], whole=True)
    fast = _run(handle, stream, make(), [events[:1], events[1 : batch + 1]], whole=False)
    each = slow[0], fast[0], slow[1], fast[1]
    return Batches(handle.name, make().name, batch, *each, _apart(handle, stream, make(), events[:batch]))


def _run(handle: ModelHandle, stream: Stream, editor: Any, steps: list[list[EditEvent]], whole: bool) -> tuple[float, float]:
    """Edits a second and a CPU second from the second step on."""
    editor.prepare(handle, stream.train_pool())
    seconds, of_cpu = 0.0, 0.0
    for n, events in enumerate(steps, 1):
        learned = {k: handle.cache[k] for k in _LEARNED if k in handle.cache}
        handle.cache.clear()
        handle.cache.update(learned)
        start = time.perf_counter(), time.process_time()
        with whole_model(handle) if whole else nullcontext():
            report = editor.apply(EditBatch(tuple(events), n))
        if n > 1:
            seconds, of_cpu = seconds + time.perf_counter() - start[0], of_cpu + time.process_time() - start[1]
        if report.failed:
            raise RuntimeError(f"{editor.name} failed: {next(iter(report.failed.values()))}")
    made = sum(map(len, steps[1:]))
    return made / seconds, made / of_cpu


def _apart(handle: ModelHandle, stream: Stream, editor: Any, events: list[EditEvent]) -> float:
    editor.prepare(handle, stream.train_pool())
    editor._set_up(events[0])
    layer = editor.hyper.layers[-1]

    def found(some: list[EditEvent]) -> Tensor:
        task = TargetTask(handle, some, layer, editor.contexts, editor.config.end)
        return search(task, editor.hyper, layer_outputs(handle, some, layer).norm(dim=1)).delta

    together = found(events)
    with whole_model(handle):
        alone = torch.cat([found([e]) for e in events[: _PLAIN - 1]])
    return float(((together[: len(alone)] - alone).norm(dim=1) / alone.norm(dim=1).clamp(min=1e-30)).max())


def small_gpt2(like: ModelHandle) -> ModelHandle:
    """A GPT-2 of the small one's shape (12 layers, width 768, 50,257 tokens) with random weights, and a tokenizer of another model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(pad_token_id=like.tokenizer.pad_token_id))
    return ModelHandle(model.float(), like.tokenizer, None, "random GPT-2 small", FAMILIES["gpt2"], torch.device("cpu"))


@dataclass(frozen=True)
class Solve:
    """One batch's change after many past edits, in seconds: as it is solved here, and densely."""

    width: int
    past: int
    batch: int
    seconds: float
    dense_seconds: float
    """The released form, `(P (K K^T + H) + L2 I)^-1 P K R^T` by LU, H already summed."""
    cholesky_seconds: float
    """The best dense one: a Cholesky factor of the symmetric f x f system, n right-hand sides."""
    difference: float
    """Relative difference of the change from the released form's."""

    @property
    def ratio(self) -> float:
        return self.dense_seconds / self.seconds


def solve(width: int = 4096, past: int = 2000, batch: int = 100, out: int = 1024) -> Solve:
    """AlphaEdit's solve of one layer, in float64 throughout, 40 directions excluded."""
    g = torch.Generator().manual_seed(0)
    v = torch.linalg.qr(torch.randn(width, 40, generator=g, dtype=torch.float64))[0]
    old, keys = (torch.randn(n, width, generator=g, dtype=torch.float64) for n in (past, batch))
    residual, l2 = torch.randn(batch, out, generator=g, dtype=torch.float64), 10.0
    ridge = Ridge(NullSpace(v, l2), history=True)
    for part in old.split(batch):
        ridge.append(part)
    ridge.solve(keys[:1], residual[:1])
    seconds, found = _timed(lambda: ridge.solve(keys, residual))
    eye = torch.eye(width, dtype=torch.float64)
    p, history = eye - v @ v.T, old.T @ old
    slow, want = _timed(lambda: torch.linalg.solve(p @ (keys.T @ keys + history) + l2 * eye, p @ keys.T @ residual).T)
    projected = p @ history @ p
    best, _ = _timed(lambda: _symmetric(projected, p @ keys.T, l2 * eye))
    change = found.left.T @ found.right
    return Solve(width, past, batch, seconds, slow, best, float((change - want).norm() / want.norm()))


def _symmetric(history: Tensor, g: Tensor, ridge: Tensor) -> Tensor:
    return torch.cholesky_solve(g, torch.linalg.cholesky(history + g @ g.T + ridge))


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = run()
    return time.perf_counter() - start, out
