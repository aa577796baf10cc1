"""Training of a method that learns to edit, before the first edit: a budget, early stopping, a cache, and resuming when killed.

The random numbers of a step depend on (seed, step) alone, and everything that a step reads is in the checkpoint, so that on a CPU
a training that was killed ends with the same bits as one that was not. The budget in CPU seconds is looked at when the training is
judged; a training that it ends may end at another step on another machine, which its note says.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import content_id
from testbed.core.ranges import Fraction, NonNegativeInt, PositiveFloat, PositiveInt
from testbed.editors.base import EditorConfig
from testbed.editors.meta.examples import MOST_HELD_OUT, generator_of
from testbed.editors.work import TrainingBefore
from testbed.model.handle import ModelHandle
from testbed.storage.files import StoreError, read_state, replacing
from testbed.storage.shared_cache import exclusive, package_version

_LEARNED = 0.98
"""A training learned where the loss on held-out edits fell below this share of its first value."""
_POINTS = 8
"""Points of the learning curve that a note shows."""
_CODE = ("lifelong-editing-testbed", "torch", "transformers")
"""Packages whose version can change what is learned."""


@dataclass(frozen=True)
class MetaTrainingConfig(EditorConfig):
    """What every training before the first edit is bounded by; a method's own file gives the other fields."""

    train_batch: PositiveInt = 10
    """Examples in one optimiser step (published for MEND and SERAC: 10)."""
    clip: PositiveFloat = 100.0
    """Largest norm of the gradient (published for MEND: 100)."""
    cpu_minutes: PositiveFloat = 30.0
    """Budget of the training."""
    held_out: Fraction = 0.1
    """Share of the entities of the train edits by which the training is judged."""
    train_seed: NonNegativeInt = 0
    """Seed of the training, which runs of different seeds share."""


class MetaTask(Protocol):
    """What is trained, and how it is judged."""

    tensors: Mapping[str, Tensor]
    """The trained leaf tensors by name, float32, changed in place by the training."""
    fixed: Mapping[str, Tensor]
    """Other tensors that the trained ones belong to, such as statistics of the data."""

    def begin(self) -> None:
        """Fill in `fixed`, in place, before a new training; one that is gone on with has it from its checkpoint."""
        ...

    def rate(self, name: str) -> float:
        """Adam's step size for the tensor of this name."""
        ...

    def loss(self, generator: torch.Generator) -> Tensor:
        """The loss of one mini-batch, a number (nats), drawn with the generator."""
        ...

    def judge(self) -> dict[str, float]:
        """Numbers about the held-out train edits; `loss`, of which less is better, is one of them."""
        ...


@dataclass(frozen=True)
class Plan:
    """How long a training goes on, and what it is called on screen.

    steps: optimiser steps at most. cpu_seconds: budget, looked at when the training is judged. every: steps between two judgements.
    patience: judgements in a row without a better one after which it ends. clip: largest norm of the gradient. seed: of all draws.
    """

    name: str
    steps: int
    cpu_seconds: float
    every: int
    patience: int
    clip: float
    seed: int = 0

    @classmethod
    def of(cls, name: str, h: Any) -> Plan:
        """The plan of a method's hyper-parameters, filled in: `MetaTrainingConfig` with train_steps, judge_every and patience."""
        return cls(name, h.train_steps, 60 * h.cpu_minutes, h.judge_every, h.patience, h.clip, h.train_seed)


@dataclass
class Training:
    """A training so far.

    best: the tensors of the best judgement. fixed: the other tensors. curve: a judgement an item, with its `step`. seconds: CPU
    seconds used, those of killed processes included. ended: why it ended; "" as long as it goes on.
    """

    best: dict[str, Tensor] = field(default_factory=dict)
    fixed: dict[str, Tensor] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    step: int = 0
    seconds: float = 0.0
    ended: str = ""

    @property
    def lowest(self) -> float:
        """The least loss on held-out edits so far."""
        return min((p["loss"] for p in self.curve), default=torch.inf)

    @property
    def learned(self) -> bool:
        """Whether the loss on held-out edits fell."""
        return self.lowest <= _LEARNED * self.curve[0]["loss"]

    @property
    def note(self) -> str:
        """A sentence with the learning curve, which says so where nothing was learned."""
        every = max(1, -(-len(self.curve) // _POINTS))
        points = {p["step"]: p for p in (*self.curve[::every], self.curve[-1])}.values()
        curve = ", ".join(f"{p['step']:,.0f}: {p['loss']:.3g}" for p in points)
        best = min(self.curve, key=lambda p: p["loss"])
        more = ", ".join(f"{k} {v:.3g}" for k, v in best.items() if k not in ("step", "loss"))
        line = f"{self.step:,} steps, {self.seconds:,.0f} CPU seconds, {self.ended}; loss on held-out edits by step {curve}"
        line += f"; step {best['step']:,.0f} is kept" + (f" ({more})" if more else "")
        return line if self.learned else f"the meta-training learned nothing that holds on held-out edits: {line}"


def cache_key(handle: ModelHandle, *parts: object) -> str:
    """The name of a training: a hash of the model, the form in which it is asked, the data and settings in `parts`, and the code."""
    form = (handle.family.text, handle.family.answer, dict(handle.examples))
    return content_id(handle.hash, str(handle.dtype), handle.device.type, form, [package_version(p) for p in _CODE], *parts)


def trained(task: MetaTask, plan: Plan, handle: ModelHandle, key: str) -> Training:
    """Train, or take over what was trained under this key. The best tensors are in the result, and not in the task.

    A finished training is kept on the handle and, where it has a folder for what runs share, on disk; an unfinished one there is
    gone on with. Of two processes that need the same training the second waits.
    """
    kept: dict[str, Training] = handle.cache.setdefault("meta-training", {})
    path = _path(plan.name, handle, key)
    if key not in kept:
        with exclusive(path) if path is not None else nullcontext():
            kept[key] = _run(task, plan, path)
    return kept[key]


def finished(name: str, handle: ModelHandle, key: str) -> bool:
    """Whether a training of this method under this key is finished and kept, on the handle or on disk."""
    path = _path(name, handle, key)
    if key in handle.cache.get("meta-training", {}):
        return True
    try:
        return path is not None and path.is_file() and bool(read_state(path)["ended"])
    except StoreError:  # a damaged file is made again
        return False


def before_first_edit(h: Any, rows: float, layers: float, numbers: float, is_cached: Callable[[TrainPool], bool]) -> TrainingBefore:
    """What a training with these settings has the model do (`MetaTrainingConfig` with train_steps and judge_every, filled in).

    rows: rows that are run for one example. layers: decoder layers that they run forward and back. numbers: trained numbers.
    """
    examples = h.train_batch + MOST_HELD_OUT / h.judge_every
    return TrainingBefore(h.train_steps, rows * examples, layers, numbers, 60 * h.cpu_minutes, is_cached)


def _path(name: str, handle: ModelHandle, key: str) -> Path | None:
    """The file of a training in the folder for what runs share; None without such a folder."""
    return None if handle.cache_folder is None else handle.cache_folder / f"meta-{name}-{key}.safetensors"


def _run(task: MetaTask, plan: Plan, path: Path | None) -> Training:
    from testbed.model.progress import bars  # rich draws from the global generator when it is imported

    adam = torch.optim.Adam([{"params": [t], "lr": task.rate(name)} for name, t in task.tensors.items()])
    training = _restored(task, adam, path) if path is not None else Training()
    if not training.curve:
        task.begin()
        training.fixed = {name: t.clone() for name, t in task.fixed.items()}
    with bars() as shown:
        advance_to(task, plan, adam, training, lambda: _keep(task, adam, training, path), lambda n: shown.advance(plan.name, n, plan.steps))
    return training


def advance_to(
    task: MetaTask,
    plan: Plan,
    adam: torch.optim.Adam,
    training: Training,
    keep: Callable[[], None],
    progress: Callable[[int], None] = lambda step: None,
) -> None:
    """Go on with a training to its end, judging it before the first step and after every `plan.every` steps.

    keep: called after each judgement, which is where a killed training is taken up again.
    """
    since = time.process_time() - training.seconds
    while not training.ended:
        judged = bool(training.curve) and training.curve[-1]["step"] == training.step
        if not judged and (training.step % plan.every == 0 or training.step >= plan.steps):
            _judge(task, training)
            training.seconds = time.process_time() - since
            training.ended = _ending(plan, training)
            keep()
            progress(training.step)
        if not training.ended and not _step(task, plan, adam, training):
            training.ended = f"ended by a loss that was not finite at step {training.step + 1:,}"
            keep()


def _step(task: MetaTask, plan: Plan, adam: torch.optim.Adam, training: Training) -> bool:
    """One optimiser step; False, and nothing changed, where the loss or its gradient is not finite."""
    adam.zero_grad()
    loss = task.loss(generator_of(plan.seed, training.step + 1))
    loss.backward()
    gradients = [t.grad for t in task.tensors.values() if t.grad is not None]
    norm = sum(float(g.square().sum()) for g in gradients) ** 0.5  # over tensors that may lie on several devices
    if not (math.isfinite(float(loss.detach())) and math.isfinite(norm)):
        return False
    for g in gradients if norm > plan.clip else []:
        g.mul_(plan.clip / norm)
    adam.step()
    training.step += 1
    return True


def _judge(task: MetaTask, training: Training) -> None:
    """Add a judgement to the curve, and keep the tensors where it is the best."""
    numbers = task.judge()
    if not training.curve or numbers["loss"] < training.lowest:
        training.best = {name: t.detach().clone() for name, t in task.tensors.items()}
    training.curve.append({"step": float(training.step), **numbers})


def _ending(plan: Plan, training: Training) -> str:
    """Why the training ends here; "" where it goes on."""
    losses = [p["loss"] for p in training.curve]
    since_best = len(losses) - 1 - losses.index(min(losses))
    if training.step >= plan.steps:
        return "all steps taken"
    if since_best >= plan.patience:
        return f"ended after {since_best} judgements without a better one"
    if training.seconds >= plan.cpu_seconds:
        return f"ended by its budget of {plan.cpu_seconds:,.0f} CPU seconds, on another machine perhaps at another step"
    return ""


def _keep(task: MetaTask, adam: torch.optim.Adam, training: Training, path: Path | None) -> None:
    """Write the checkpoint: the tensors now and at their best, Adam's state, and the numbers."""
    if path is None:
        return
    tensors = {f"fixed.{name}": t for name, t in training.fixed.items()}
    for name, tensor in task.tensors.items():
        tensors[f"now.{name}"], tensors[f"best.{name}"] = tensor.detach(), training.best[name]
        tensors |= {f"adam.{k}.{name}": v for k, v in adam.state.get(tensor, {}).items()}
    about = {"curve": training.curve, "step": training.step, "seconds": training.seconds, "ended": training.ended}
    with replacing(path) as temporary:
        own = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        save_file(own, temporary, metadata={"json": json.dumps(about)})


def _restored(task: MetaTask, adam: torch.optim.Adam, path: Path) -> Training:
    """The training in a file, with its tensors in the task and in Adam; a new one where there is no file that can be read."""
    try:
        stored = read_state(path) if path.is_file() else {}
    except StoreError:  # a damaged file is made again
        stored = {}
    if not stored:
        return Training()
    best, fixed = {}, {name: stored[f"fixed.{name}"].to(t.device) for name, t in task.fixed.items()}
    with torch.no_grad():
        for name, tensor in task.fixed.items():
            tensor.copy_(fixed[name])
        for name, tensor in task.tensors.items():
            tensor.copy_(stored[f"now.{name}"])
            best[name] = stored[f"best.{name}"].to(tensor.device)
            parts: dict[str, Any] = {k: stored.get(f"adam.{k}.{name}") for k in ("step", "exp_avg", "exp_avg_sq")}
            if parts["step"] is not None:
                adam.state[tensor] = {k: v if k == "step" else v.to(tensor.device) for k, v in parts.items()}
    return Training(best, fixed, stored["curve"], int(stored["step"]), stored["seconds"], stored["ended"])
