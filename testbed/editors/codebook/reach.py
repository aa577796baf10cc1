"""How near a row must be for its distance to a new ball to matter, so that a codebook measures a few rows exactly and not all.

Where balls are wide, nearly all meet. What a codebook wants to know of a new one (which row is nearest, which are
superseded, whose cap becomes tighter, which of its own caps binds) hangs on few distances, and bounds that a fp32
product gives tell which.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SPARE = 1 + 1e-9
"""More than float64 loses in a quotient."""


@dataclass(frozen=True)
class Met:
    """Rows (n,) as a ball meets them.

    active: bool. rival: bool, active with another label. zone: within which one of the two supersedes the other. both: the sum of
    raw radii, within which the balls meet. cap: what the row's cap leaves of its raw radius, as a part of 1, inf for none.
    """

    active: Tensor
    rival: Tensor
    zone: Tensor
    both: Tensor
    cap: Tensor


def reach(met: Met, low: Tensor, high: Tensor) -> Tensor:
    """(n,) float64, negative for rows that never matter. low, high: (n,) bounds of the distances.

    Beyond it a row is superseded by none and supersedes none, is not the nearest one that is met, keeps its cap, and is not
    the one whose cap binds the ball, even when those that it supersedes are gone.
    """
    stays = met.rival & (low > met.zone) & (high < met.both)
    least = _least(high / met.both, stays)
    capped = met.both * torch.maximum(met.cap.nan_to_num(torch.inf, torch.inf), least).clamp_max(1.0) * _SPARE
    first = torch.minimum(_least(high, met.active & (high < met.both)), met.both)
    return torch.where(met.rival, torch.maximum(torch.maximum(met.zone, capped), first), torch.where(met.active, first, -1.0))


def _least(x: Tensor, among: Tensor) -> Tensor:
    """The least of some numbers (n,); inf where there is none."""
    return torch.cat([x[among], x.new_tensor([torch.inf])]).min()
