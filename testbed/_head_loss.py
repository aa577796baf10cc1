"""The loss of answers under a wide head, a piece of the vocabulary at a time.

A head of 50,000 tokens costs more than a few layers below it. Its product runs faster in blocks of some rows and
tokens, and where each block is turned into its part of the gradient at once, no logits are kept for a backward
pass. Same result as the softmax over all at once, up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from testbed.models import ModelHandle
from testbed.tail import inside_plain

TOKENS = 4096
"""Tokens of a block. A vocabulary that fits into two of them is taken whole."""
ROWS = 512


def answer_loss(handle: ModelHandle, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of one token a row, and whether it is the likeliest.

    Args:
        hidden: (n, d) what enters the head, after the last norm.
        targets: (n,) int64 token ids.

    Returns:
        (n,) float32 nats, differentiable by `hidden` once, and (n,) bool; both beside the model's inputs.
    """
    head, home = handle.head, handle.device
    if in_blocks(head) and not inside_plain():
        loss, best = _Blocks.apply(hidden.to(head.weight.device), head.weight, head.bias, targets.to(head.weight.device))
        return loss.to(home), best.to(home)
    logits = head(hidden).to(home).float()
    own = logits.detach().gather(1, targets[:, None])[:, 0]
    return nn.functional.cross_entropy(logits, targets, reduction="none"), own >= logits.detach().amax(1)


def in_blocks(head: nn.Module) -> bool:
    """Whether a head is a plain matrix, in memory, and wide enough to gain."""
    return type(head) is nn.Linear and len(head.weight) > 2 * TOKENS and not head.weight.is_meta and not hasattr(head, "_hf_hook")


class _Blocks(torch.autograd.Function):
    """(n, d), (V, d), (V,) or None, (n,) to losses (n,) and whether the target is the likeliest (n,)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[0]
        parts = [_rows(h, weight, bias, t, wanted) for h, t in zip(hidden.split(ROWS), targets.split(ROWS))]
        loss, best, *grad = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(*grad)
        ctx.mark_non_differentiable(best)
        return loss, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (grad,) = ctx.saved_tensors
        return grads[0].to(grad)[:, None] * grad, None, None, None


def _rows(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, wanted: bool) -> tuple[Tensor, ...]:
    """Losses (r,) float32, whether the target is the likeliest (r,), and, where wanted, the gradient (r, d) of each loss."""
    blocks, total, own, first = [], [], hidden.new_zeros(len(hidden), dtype=torch.float32), 0
    top = torch.full_like(own, -torch.inf)
    for part, more in _split(weight, bias):
        logits = nn.functional.linear(hidden, part, more).float()
        here = (targets >= first) & (targets < first + len(part))
        own = torch.where(here, logits.gather(1, (targets - first).clamp(0, len(part) - 1)[:, None])[:, 0], own)
        top = torch.maximum(top, logits.amax(1))
        total.append(logits.logsumexp(1))
        first += len(part)
        if wanted:
            blocks.append(logits)
    whole = torch.stack(total).logsumexp(0)
    if not wanted:
        return whole - own, own >= top
    grad = -weight[targets].float()
    for logits, (part, _) in zip(blocks, _split(weight, bias), strict=True):
        share = logits.sub_(whole[:, None]).exp_().to(weight.dtype)
        grad = grad.addmm_(share, part) if part.dtype == grad.dtype else grad.add_(share @ part)
    return whole - own, own >= top, grad.to(hidden.dtype)


def _split(weight: Tensor, bias: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    parts = weight.split(TOKENS)
    return list(zip(parts, bias.split(TOKENS) if bias is not None else [None] * len(parts)))
