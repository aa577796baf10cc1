"""The training of KE's network: the new answer as likely as can be, while other answers stay within a margin (`ke.py`, equation 3).

The constraint has a multiplier of its own, which rises in a step where the divergence is over the margin and falls, to 0 at the least,
where it is under; the margin itself shrinks as long as the held-out edits succeed. Neither is moved by the optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from testbed.core.events import Ask
from testbed.editors.adapters.lowrank import TargetModule
from testbed.editors.meta.examples import MetaExample, MetaExamples, apart, drawn_apart, example, generator_of
from testbed.editors.meta.gradients import factors_of, hooked_forward, low_rank_adds
from testbed.editors.meta.ke_network import CONDITION, ConditionedNetwork, embedded_conditions
from testbed.editors.meta.mend_training import divergence, parts_of
from testbed.model.handle import ModelHandle

_SUCCEEDS = 0.9
"""Share of held-out edits that succeed from which the margin shrinks."""
_KEPT = 0.99
"""What the running mean of squared violations keeps of itself in a step, as RMSprop's default."""


class EditOutcome(NamedTuple):
    """nats: (2 B,) smoothed cross-entropy a token of the new answers, of B edits and then of their rephrasings. right: (2 B,) bool,
    whether every token of the answer is the likeliest. kept: (n,) KL of the other edits' old answers, nats a token."""

    nats: Tensor
    right: Tensor
    kept: Tensor


def condition_of(e: MetaExample) -> str:
    """The text by which an edit is known to the network."""
    return CONDITION.format(old=e.previous, new=e.answer, prompt=e.edit.prompt)


class KETask:
    """What `training.trained` trains: the network's tensors, and `multiplier`, `violation` and `margin`, which this class moves.

    violation: running mean of the squared violation, by which the multiplier's steps are measured.
    """

    def __init__(
        self, handle: ModelHandle, targets: Sequence[TargetModule], network: ConditionedNetwork, examples: MetaExamples, h: Any
    ) -> None:
        self.handle, self.targets, self.network, self.examples, self.h = handle, targets, network, examples, h
        self.multiplier, self.violation = torch.tensor(1.0), torch.tensor(0.0)
        self.margin = torch.tensor(h.margin, dtype=torch.float64)
        moved = {"multiplier": self.multiplier, "violation": self.violation, "margin": self.margin}
        self.tensors: Mapping[str, Tensor] = {**network.tensors, **moved}
        self.fixed: Mapping[str, Tensor] = {}

    def begin(self) -> None:
        """Nothing beside the tensors is computed."""

    def rate(self, name: str) -> float:
        return self.h.lr

    def loss(self, generator: torch.Generator) -> Tensor:
        """The Lagrangian of one mini-batch; behind it the multiplier takes its step."""
        found = self.outcome(drawn_apart(self.examples.train, self.h.train_batch, generator))
        kept = found.kept.mean()
        loss = found.nats.mean() + float(self.multiplier) * (kept - float(self.margin))
        self.ascend(float(kept.detach()))
        return loss

    def ascend(self, kept: float) -> None:
        """Move the multiplier by the violation of the constraint, measured by what violations were so far."""
        over = kept - float(self.margin)
        if not math.isfinite(over):
            return
        self.violation.mul_(_KEPT).add_((1 - _KEPT) * over**2)
        step = self.h.lr_multiplier * over / max(float(self.violation) ** 0.5, 1e-8)
        self.multiplier.add_(step).clamp_(min=0.0)

    def outcome(self, batch: Sequence[MetaExample]) -> EditOutcome:
        """Edit each example on its own; ask it, its rephrasing, and other edits of the mini-batch with their old answers."""
        answers = [e.answer for e in batch]
        factors = factors_of(self.handle, self.targets, [e.edit for e in batch], answers)
        condition = self.network.condition(*embedded_conditions(self.handle, [condition_of(e) for e in batch]))
        changes, own = self.network.changed(condition, factors), torch.arange(len(batch))
        asks = [e.edit for e in batch] + [e.rephrasing for e in batch]
        asked = hooked_forward(self.handle, self.targets, asks, answers * 2)
        log_p, ids = asked.log_probabilities(low_rank_adds(changes, own.repeat(2))), asked.batch.answer_ids
        right = asked.mean_by_row((log_p.argmax(-1) == ids).float()) == 1
        others, group = _others(batch, self.h.others)
        beside = hooked_forward(self.handle, self.targets, [ask for ask, _ in others], [old for _, old in others])
        kept = divergence(beside, low_rank_adds(changes, group))
        return EditOutcome(asked.mean_by_row(smoothed(log_p, ids, self.h.smoothing)), right, kept)

    def judge(self) -> dict[str, float]:
        """The held-out edits, with the same draws each time: nats of the new answers and KL beside; the margin may shrink behind it."""
        generator, held, parts = generator_of(self.h.train_seed, 0), self.examples.held_out, list[EditOutcome]()
        with torch.no_grad():
            for part in parts_of(apart(held), self.h.train_batch):
                parts.append(self.outcome([example(e, held, generator) for e in part]))
        nats, right, kept = (torch.cat(x).float().mean().item() for x in zip(*parts))
        if right > _SUCCEEDS:
            self.margin.mul_(self.h.margin_factor).clamp_(min=self.h.least_margin)
        numbers = {"right": right, "kl_beside": kept, "multiplier": float(self.multiplier), "margin": float(self.margin)}
        return {"loss": nats + kept, **numbers}


def _others(batch: Sequence[MetaExample], n: int) -> tuple[list[tuple[Ask, str]], Tensor]:
    """Questions with their old answers that each edit of a mini-batch must leave alone, and whose they are.

    They are those of the n edits that follow it, around the end (all others where there are fewer); an edit that stands alone has
    its locality question.
    """
    if len(batch) == 1:
        return [(batch[0].locality, batch[0].kept)], torch.zeros(1, dtype=torch.long)
    pairs = [(i, batch[(i + k) % len(batch)]) for i in range(len(batch)) for k in range(1, min(n, len(batch) - 1) + 1)]
    return [(e.edit, e.previous) for _, e in pairs], torch.tensor([i for i, _ in pairs])


def smoothed(log_p: Tensor, ids: Tensor, epsilon: float) -> Tensor:
    """(n,) cross-entropy (nats) with a target that gives epsilon of its mass to the other tokens, in equal parts; log_p (n, V)."""
    own, each = log_p.gather(1, ids[:, None])[:, 0], epsilon / (log_p.shape[1] - 1)
    return -(1 - epsilon - each) * own - each * log_p.sum(-1)
