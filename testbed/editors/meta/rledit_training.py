"""The training of RLEdit's network: the loss of equation 1 (`rledit.py`) over trajectories of train edits.

No gradient passes from one step of a trajectory to an earlier one: the weights at which a step begins and the gradients of its
edits are what the process has come to, and the network answers for the step's own change alone. So the gradient of a trajectory is
the sum of its steps' gradients, and memory holds the forwards of one step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testbed.editors.adapters.lowrank import TargetModule
from testbed.editors.locate.ultraedit import RunningStatistics
from testbed.editors.meta.examples import MetaExample, MetaExamples, apart, drawn_apart, example, generator_of
from testbed.editors.meta.gradients import answer_rows, dense_adds, hooked_forward
from testbed.editors.meta.malmen_network import MalmenNetwork
from testbed.editors.meta.mend_training import divergence, parts_of
from testbed.model.handle import ModelHandle, as_stored


@dataclass(frozen=True)
class TrajectoryStep:
    """One batch of edits at a state of the weights.

    weights: by name, as the model stores them, before the step. keys (n, f) and deltas (n, d): of the batch's answer tokens, by
        target. changes: (d, f) by target, differentiable by the network. window: this batch and those before it, the newest first.
    """

    weights: Mapping[str, Tensor]
    keys: list[Tensor]
    deltas: list[Tensor]
    changes: list[Tensor]
    window: tuple[Sequence[MetaExample], ...]


class RLEditTask:
    """What `training.trained` trains; `network` holds the tensors. A trajectory begins at the unedited weights."""

    def __init__(
        self, handle: ModelHandle, targets: Sequence[TargetModule], network: MalmenNetwork, examples: MetaExamples, h: Any
    ) -> None:
        self.handle, self.targets, self.examples, self.h = handle, targets, examples, h
        self.network, self.tensors, self.fixed = network, network.tensors, network.statistics

    def begin(self) -> None:
        """Compute means and deviations of keys and gradients over train edits, at the unedited weights."""
        found = [RunningStatistics() for _ in self.targets]
        for part in parts_of(self.examples.train[: self.h.normalise_over], self.h.train_batch):
            keys, deltas, _ = answer_rows(self.handle, self.targets, [e.event.ask() for e in part], [e.event.target for e in part])
            found = [s.with_rows(torch.cat(rows, -1)) for s, *rows in zip(found, keys, deltas)]
        self.network.normalise_by(found)

    def rate(self, name: str) -> float:
        return self.h.lr_alpha if name.startswith("alpha") else self.h.lr

    def loss(self, generator: torch.Generator) -> Tensor:
        """Equation 1 for one trajectory; its gradient was summed up step by step, and the result carries it."""
        examples = drawn_apart(self.examples.train, self.h.trajectory * self.h.train_batch, generator)
        own, total = list(self.tensors.values()), torch.zeros((), device=self.handle.device)
        sums = [torch.zeros_like(t) for t in own]
        for step in self.steps(examples):
            loss = self.step_loss(step)
            gradients = torch.autograd.grad(loss, own, allow_unused=True, materialize_grads=True)
            sums = [s + g for s, g in zip(sums, gradients)]
            total = total + loss.detach()
        return total + sum((((t - t.detach()) * g).sum() for t, g in zip(own, sums)), torch.zeros_like(total))

    def steps(self, examples: Sequence[MetaExample]) -> Iterator[TrajectoryStep]:
        """The steps of a trajectory that makes these edits in their order, a batch of them at once."""
        weights = {t.weight: self.handle.parameter(t.weight).detach().float() for t in self.targets}
        window: tuple[Sequence[MetaExample], ...] = ()
        for batch in parts_of(examples, self.h.train_batch):
            with self.handle.swapped(weights):
                keys, deltas, _ = answer_rows(self.handle, self.targets, [e.edit for e in batch], [e.answer for e in batch])
            window = (batch, *window)[: self.h.depth]
            step = TrajectoryStep(weights, keys, deltas, self.network.changes_of(keys, deltas), window)
            yield step
            weights = self.after(step)

    def after(self, step: TrajectoryStep) -> dict[str, Tensor]:
        """The weights behind a step, by name."""
        changes = {t.weight: as_stored(t.module, c.detach().float()) for t, c in zip(self.targets, step.changes)}
        return {name: w + changes[name].to(w.device) for name, w in step.weights.items()}

    def step_loss(self, step: TrajectoryStep) -> Tensor:
        """What one step adds to equation 1, nats."""
        asked = [e for batch in step.window for e in batch]
        shares = [self.h.discount**back / len(batch) for back, batch in enumerate(step.window) for _ in batch]
        share, adds = torch.tensor(shares, device=self.handle.device), dense_adds(step.changes)
        with self.handle.swapped(step.weights):
            edits = hooked_forward(self.handle, self.targets, [e.rephrasing for e in asked], [e.answer for e in asked]).losses(adds)
            beside = hooked_forward(self.handle, self.targets, [e.locality for e in asked], [e.kept for e in asked])
            kept = divergence(beside, adds)
        size = sum((c.square().sum().to(share) for c in step.changes), torch.zeros_like(share[0]))
        return (share * (edits + self.h.c_loc * kept)).sum() + self.h.weight_decay * size

    def judge(self) -> dict[str, float]:
        """A trajectory of the held-out edits, with the same draws each time: equation 1 a step, and what is right behind its end."""
        generator, held = generator_of(self.h.train_seed, 0), self.examples.held_out
        examples = [example(e, held, generator) for e in apart(held)]
        losses, weights = list[float](), dict[str, Tensor]()
        with torch.no_grad():
            for step in self.steps(examples):
                losses.append(float(self.step_loss(step)))
                weights = self.after(step)
            with self.handle.swapped(weights):
                asked = hooked_forward(self.handle, self.targets, [e.rephrasing for e in examples], [e.answer for e in examples])
                right = (asked.log_probabilities([]).argmax(-1) == asked.batch.answer_ids).float()
        whole = (asked.mean_by_row(right) == 1).float().mean().item()
        return {"loss": sum(losses) / len(losses), "rephrasing_right_at_the_end": whole}
