"""The training of MEND's network: the loss of equation 5 (`mend.py`) on train edits, whose changes each act on their own rows.

Many edits are trained on in one forward: the change of a weight is of low rank, so that each row gets its own edit's change as an
addition to the output of the map, and no weight is ever built.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from testbed.editors.adapters.lowrank import TargetModule
from testbed.editors.locate.ultraedit import RunningStatistics
from testbed.editors.meta.examples import MetaExample, MetaExamples, drawn, example, generator_of
from testbed.editors.meta.gradients import Add, HookedForward, factors_of, hooked_forward, low_rank_adds
from testbed.editors.meta.mend_network import MendNetwork
from testbed.model.handle import ModelHandle

T = TypeVar("T")


class Outer(NamedTuple):
    """rephrasing: (R,) nats a token of the new answer. kept: (R,) KL of the other question, nats. right: (R,) bool, whether every token
    of the new answer is the likeliest behind the rephrasing."""

    rephrasing: Tensor
    kept: Tensor
    right: Tensor


class MendTask:
    """What `training.trained` trains; `network` holds the tensors. The model is used under the weights as they are when it is called."""

    def __init__(self, handle: ModelHandle, targets: Sequence[TargetModule], network: MendNetwork, examples: MetaExamples, h: Any) -> None:
        self.handle, self.targets, self.examples, self.h = handle, targets, examples, h
        self.network, self.tensors, self.fixed = network, network.tensors, network.statistics

    def begin(self) -> None:
        """Compute the statistics of equation 2."""
        if self.h.normalise:
            self.network.normalise_by(self._statistics())

    def rate(self, name: str) -> float:
        return self.h.lr_alpha if name.startswith("alpha") else self.h.lr

    def _statistics(self) -> list[RunningStatistics]:
        """Of the rows [u; delta] at each target over train edits, each edit with its own prompt and answer."""
        found = [RunningStatistics() for _ in self.targets]
        for part in parts_of(self.examples.train[: self.h.normalise_over], self._rows):
            factors = factors_of(self.handle, self.targets, [e.event.ask() for e in part], [e.event.target for e in part])
            rows = (torch.cat([f.u[f.kept], f.delta[f.kept]], -1) for f in factors)
            found = [s.with_rows(r) for s, r in zip(found, rows)]
        return found

    @property
    def _rows(self) -> int:
        return self.h.train_batch * self.h.edits_at_once

    def loss(self, generator: torch.Generator) -> Tensor:
        """Equation 5, the mean over the updates of one mini-batch."""
        outer = self.outer(drawn(self.examples.train, self._rows, generator))
        return self.h.c_edit * outer.rephrasing.mean() + self.h.c_loc * outer.kept.mean()

    def outer(self, batch: Sequence[MetaExample]) -> Outer:
        """Edit, and ask the rephrasings and the other questions; the gradient reaches the network through equation 4 alone."""
        factors = factors_of(self.handle, self.targets, [e.edit for e in batch], [e.answer for e in batch])
        adds = self._adds(self.network.changed(factors), len(batch))
        asked = hooked_forward(self.handle, self.targets, [e.rephrasing for e in batch], [e.answer for e in batch])
        log_p, ids = asked.log_probabilities(adds), asked.batch.answer_ids
        right = (log_p.argmax(-1) == ids).float()
        beside = hooked_forward(self.handle, self.targets, [e.locality for e in batch], [e.kept for e in batch])
        nll = -log_p.gather(1, ids[:, None])[:, 0]
        return Outer(asked.mean_by_row(nll), divergence(beside, adds), asked.mean_by_row(right) == 1)

    def _adds(self, changes: Sequence[tuple[Tensor, Tensor]], rows: int) -> list[Add]:
        """By target, what the change of each row's own group adds to the map's output."""
        return low_rank_adds(changes, torch.arange(rows) // self.h.edits_at_once)

    def judge(self) -> dict[str, float]:
        """Equation 5 on the held-out edits, with the same draws each time, and its parts."""
        generator, parts = generator_of(self.h.train_seed, 0), list[Outer]()
        held = self.examples.held_out
        for part in parts_of(held, self._rows):
            batch = [example(e, held, generator) for e in part]
            with torch.no_grad():
                parts.append(self.outer(batch))
        rephrasing, kept, right = (torch.cat(x).float().mean().item() for x in zip(*parts))
        return {"loss": self.h.c_edit * rephrasing + self.h.c_loc * kept, "rephrasing_right": right, "kl_beside": kept}


def divergence(forward: HookedForward, adds: Sequence[Add]) -> Tensor:
    """(R,) mean over the positions that predict the answer of KL(before || after), nats."""
    with torch.no_grad():
        before = forward.log_probabilities([])
    after = forward.log_probabilities(adds)
    return forward.mean_by_row((before.exp() * (before - after)).sum(-1))


def parts_of(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The items in their order, so many at a time; the last part may be smaller."""
    for at in range(0, len(items), size):
        yield items[at : at + size]
