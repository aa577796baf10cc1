"""TIES merging (Yadav et al., NeurIPS 2023, arXiv 2306.01708) of changes of one matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def ties(changes: Sequence[Tensor], weights: Sequence[float], density: float) -> Tensor:
    """Changes of one shape, each with a positive weight, to one change.

    Of each change the share `density` of its entries with the largest magnitude is kept; the sign of every entry is
    that of the weighted sum; entries of the other sign are left out, and those that stay are averaged by weight.
    """
    kept = torch.stack([trimmed(c, density) for c in changes])
    weight = torch.tensor(list(weights), dtype=kept.dtype, device=kept.device).reshape(-1, *[1] * (kept.ndim - 1))
    sign = (weight * kept).sum(0).sign()
    agree = (kept.sign() == sign) & (kept != 0)
    total = (weight * kept * agree).sum(0)
    return total / (weight * agree).sum(0).clamp(min=torch.finfo(kept.dtype).tiny)


def trimmed(change: Tensor, density: float) -> Tensor:
    """The largest entries by magnitude, at least one; the others are zero."""
    n = max(1, round(density * change.numel()))
    if n == change.numel():
        return change
    at = change.abs().flatten().topk(n).indices
    return torch.zeros_like(change.flatten()).index_copy(0, at, change.flatten()[at]).reshape(change.shape)
