"""The loss of answers under a wide head, a piece of the vocabulary at a time.

A head of 50,000 tokens costs more than a few layers below it. Its product runs faster in blocks of some rows and
tokens, and where each block is turned into its part of the gradient at once, the head is read from memory once and
no logits are kept for a backward pass. Same result as the softmax over all at once, up to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from testbed.model.handle import ModelHandle

TOKENS = 4096
"""Tokens of a block. A vocabulary that fits into two of them is taken whole."""
_LEAST, _BYTES = 256, 2**23
"""A block has fewer tokens where they would take more bytes than this, which stay in the cache from one product to the next."""
ROWS = 512
_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def answer_loss(
    handle: ModelHandle, hidden: Float[Tensor, "n d"], targets: Int[Tensor, " n"]
) -> tuple[Float[Tensor, " n"], Bool[Tensor, " n"]]:
    """Cross-entropy of one token a row, and whether it is the likeliest.

    Args:
        hidden: (n, d) what enters the head, after the last norm.
        targets: (n,) int64 token ids.

    Returns:
        (n,) float32 nats, differentiable by `hidden` once, and (n,) bool; both beside the model's inputs.
    """
    head, home = handle.head, handle.device
    if _takes_blocks(handle):
        scaled = hidden if handle.logit_form.factor == 1.0 else hidden * handle.logit_form.factor
        loss, best = _Blocks.apply(scaled.to(head.weight.device), head.weight, head.bias, targets.to(head.weight.device))
        return loss.to(home), best.to(home)
    logits = handle.logits(hidden).float()
    own = logits.detach().gather(1, targets[:, None])[:, 0]
    return nn.functional.cross_entropy(logits, targets, reduction="none"), own >= logits.detach().amax(1)


def answer_nll(handle: ModelHandle, hidden: Float[Tensor, "n d"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The losses of `answer_loss` alone."""
    if _takes_blocks(handle):
        return answer_loss(handle, hidden, targets)[0]
    return nn.functional.cross_entropy(handle.logits(hidden).float(), targets, reduction="none")


def _takes_blocks(handle: ModelHandle) -> bool:
    """Whether the loss is taken in blocks: behind the head there is nothing but a factor, which the hidden states can carry."""
    form = handle.logit_form
    return in_blocks(handle.head) and form.cap is None and (form.factor == 1.0 or handle.head.bias is None)


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
    """Losses (r,) float32, whether the target is the likeliest (r,), and, where wanted, the gradient (r, d) of each loss.

    One pass: a block adds to the sums while it is in the cache; they are kept relative to the largest logit so far.
    """
    own, first = hidden.new_zeros(len(hidden), dtype=torch.float32), 0
    top, total = torch.full_like(own, -torch.inf), torch.zeros_like(own)
    grad = torch.zeros_like(hidden, dtype=torch.float32)
    for part, more in _split(weight, bias):
        logits = _product(hidden, part, more).float()
        here = (targets >= first) & (targets < first + len(part))
        own = torch.where(here, logits.gather(1, (targets - first).clamp(0, len(part) - 1)[:, None])[:, 0], own)
        last, top = top, torch.maximum(top, logits.amax(1))
        share, less = logits.sub_(top[:, None]).exp_(), (last - top).exp()
        total = total * less + share.sum(1)
        if wanted:
            grad = grad * less[:, None] + _product(share.to(part.dtype), part.T, None)
        first += len(part)
    loss = top + total.log() - own
    return (loss, own >= top, *([(grad / total[:, None] - weight[targets]).to(hidden.dtype)] if wanted else []))


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(n, a) x (b, a) -> (n, b). A few rows in float32 on a CPU take oneDNN a half to a quarter of the time that a BLAS needs for them."""
    if _ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and len(x) > 1:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return nn.functional.linear(x, weight, bias)


def _split(weight: Tensor, bias: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """Blocks of tokens; all of them at once on a GPU, where a call costs more than a cache spares."""
    if weight.device.type != "cpu":
        return [(weight, bias)]
    size = min(TOKENS, max(_LEAST, _BYTES // (weight.shape[1] * weight.element_size())))
    parts = weight.split(size)
    return list(zip(parts, bias.split(size) if bias is not None else [None] * len(parts)))
