"""The gradient of an answer's loss at linear maps, in its two factors, and forwards in which each row has a low-rank change of its own.

At a linear map with input u_t and gradient delta_t of the loss at the output of position t, the gradient by the weight (d, f) is

    grad_W L = sum_t delta_t u_t^T                                                                      (1)

so that the two factors, (T, d) and (T, f), hold it whole (MEND, arXiv 2110.11309, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testbed.core.events import Ask
from testbed.editors.adapters.lowrank import TargetModule
from testbed.editors.base import EditFailed
from testbed.model.answer_loss import answer_nll
from testbed.model.encoding import Batch, answer_ids, collate
from testbed.model.handle import ModelHandle
from testbed.model.layout import layout_verified, verify_layout
from testbed.model.prefix_cache import LastLayerReached
from testbed.model.suffix import mean_by_row, mean_over_answers

Add = Callable[[Tensor], Tensor]
"""What is added to a map's output: activations (B, T, f) to (B, T, d)."""
_KIND = "hooked"


@dataclass(frozen=True)
class GradientFactors:
    """Equation 1 at one linear map, for B rows of T positions.

    u: (B, T, f) float32 inputs. delta: (B, T, d) float32 gradients at the output, each of its own row's loss. kept: (B, T) bool,
    positions where neither is all zero; padding never is.
    """

    u: Tensor
    delta: Tensor
    kept: Tensor


@dataclass(frozen=True)
class HookedForward:
    """A padded batch of B rows, run through the whole model with additions at target modules. No weight takes part in a gradient."""

    handle: ModelHandle
    targets: Sequence[TargetModule]
    batch: Batch

    def final_hidden(self, adds: Sequence[Add]) -> Tensor:
        """(n, d) final hidden states, after the last norm, that predict the answers' tokens; an addition a target, or none."""
        left: list[Tensor] = []

        def leave(module: Any, args: Any, output: Tensor) -> None:
            left.append(output)
            raise LastLayerReached

        with ExitStack() as stack:
            for target, add in zip(self.targets, adds):
                hook = lambda m, args, out, add=add: self._put(add, args[0], out)  # noqa: E731
                stack.enter_context(self.handle.hooked(target.module, hook))
            stack.enter_context(self.handle.hooked(self.handle.norm, leave))
            with suppress(LastLayerReached):
                self.handle.model(**self.batch.inputs, use_cache=False)
        read = self.batch.before_answer.to(left[0].device)
        return left[0].reshape(*read.shape, -1)[read]

    def _put(self, add: Add, act: Tensor, out: Tensor) -> Tensor:
        more = add(act.reshape(*self.batch.prompt.shape, -1))
        return out + more.to(out.dtype).reshape(out.shape)

    def losses(self, adds: Sequence[Add]) -> Tensor:
        """(B,) mean cross-entropy (nats a token) of each row's answer, its end token included."""
        return mean_over_answers(answer_nll(self.handle, self.final_hidden(adds), self.batch.answer_ids), self.batch)

    def log_probabilities(self, adds: Sequence[Add]) -> Tensor:
        """(n, V) float32 log-probabilities where the answers' tokens are predicted."""
        return self.handle.logits(self.final_hidden(adds)).float().log_softmax(-1)

    def mean_by_row(self, values: Tensor) -> Tensor:
        """(B,) mean over each row's answer tokens of values (n,)."""
        return mean_by_row(values, self.batch.before_answer.nonzero()[:, 0].to(values.device), len(self.batch.answer))


def hooked_forward(handle: ModelHandle, targets: Sequence[TargetModule], asks: Sequence[Ask], answers: Sequence[str]) -> HookedForward:
    """Prompts with their answers and end tokens, ready to run; "" asks for the distribution behind the prompt alone.

    Raises `UntokenizableAnswer`, `PromptTooLong`, and, once a model, `UnknownLayout` where its logits are not those of its last norm.
    """
    ids = [answer_ids(handle, a, x) if x else [] for a, x in zip(asks, answers)]
    found = HookedForward(handle, targets, collate(handle, list(asks), ids, end=True))
    layer = targets[0].layer
    if not layout_verified(handle, layer, _KIND):
        verify_layout(handle, layer, found.batch, lambda weight: _logits(found, layer, weight), _KIND)
    return found


def _logits(forward: HookedForward, layer: int, weight: Tensor) -> Tensor:
    handle = forward.handle
    with handle.swapped({handle.down_weight(layer): weight}):
        return handle.logits(forward.final_hidden([]))


def factors_of(handle: ModelHandle, targets: Sequence[TargetModule], asks: Sequence[Ask], answers: Sequence[str]) -> list[GradientFactors]:
    """Equation 1 at each target, under the weights as they are; the loss is the sum of the rows' means over their answer tokens.

    Raises `EditFailed` where a loss is not finite, and what `hooked_forward` raises.
    """
    forward = hooked_forward(handle, targets, asks, answers)
    real = forward.batch.prompt | forward.batch.answer
    return [_factors(u, delta, real.to(u.device)) for u, delta in _traced(forward)]


def answer_rows(
    handle: ModelHandle, targets: Sequence[TargetModule], asks: Sequence[Ask], answers: Sequence[str]
) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """The factors of equation 1 where answer tokens are predicted alone: by target u (n, f) and delta (n, d) float32, and the row of each.

    The loss and the errors are those of `factors_of`.
    """
    forward = hooked_forward(handle, targets, asks, answers)
    read, traced = forward.batch.before_answer, _traced(forward)
    us, deltas = ([x[read.to(x.device)].float() for x in side] for side in zip(*traced))
    return us, deltas, read.nonzero()[:, 0].tolist()


def _traced(forward: HookedForward) -> list[tuple[Tensor, Tensor]]:
    """(B, T, f) inputs and (B, T, d) gradients at each target's output, of the sum of the rows' losses."""
    shape, acts = forward.batch.prompt.shape, list[Tensor]()
    probes = [torch.zeros(*shape, t.d, device=forward.handle.parameter(t.weight).device, requires_grad=True) for t in forward.targets]

    def add(act: Tensor, probe: Tensor) -> Tensor:
        acts.append(act.detach().float())
        return probe

    with torch.enable_grad():
        losses = forward.losses([lambda act, p=p: add(act, p) for p in probes])
        if not torch.isfinite(losses).all():
            raise EditFailed(f"the loss of an edit is {losses.detach().tolist()} under the weights as they are, so it has no gradient")
        gradients = torch.autograd.grad(losses.sum(), probes)
    return list(zip(acts, gradients))


def _factors(u: Tensor, delta: Tensor, real: Tensor) -> GradientFactors:
    kept = real & (u != 0).any(-1) & (delta != 0).any(-1)
    mask = kept[..., None]
    return GradientFactors(torch.where(mask, u, 0.0), torch.where(mask, delta.float(), 0.0), kept)


def low_rank_adds(changes: Sequence[tuple[Tensor, Tensor]], group: Tensor) -> list[Add]:
    """By target, what the change of each row's own group adds to the map's output.

    changes: left (G, K, f) and right (G, K, d) by target; the change of group g is right[g]^T left[g]. group: (B,) int64.
    """
    own = [(left[group.to(left.device)], right[group.to(right.device)]) for left, right in changes]
    return [lambda act, left=left, right=right: act.float() @ left.mT @ right for left, right in own]


def dense_adds(changes: Sequence[Tensor]) -> list[Add]:
    """By target, what one change (d, f) of the weight adds to the map's output, the same for all rows."""
    return [lambda act, c=c: act.float() @ c.to(act.device, torch.float32).mT for c in changes]
