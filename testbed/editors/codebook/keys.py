"""Where keys are read: what enters one down-projection, over prompt positions only, padding and answer excluded.

A key must not depend on the batch it was made in, beyond float rounding; `slack` is the room that rounding takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from testbed.core.events import Ask
from testbed.core.timing import timed
from testbed.editors.codebook.nearest import Metric
from testbed.model.encoding import Batch
from testbed.model.prefix_cache import ImagePrefixes
from testbed.model.suffix import mean_over_prompt

_ROWS = 32


def last(act: Tensor, batch: Batch) -> Tensor:
    """(B, f) float32 activation at the last prompt position."""
    return act[torch.arange(len(act), device=act.device), batch.last_prompt].float()


def over_picture(act: Tensor, batch: Batch) -> Tensor:
    """(B, f) float32 mean over the picture's positions; zeros for a row without a picture."""
    mask = batch.picture.unsqueeze(-1)
    return (act.float() * mask).sum(1) / mask.sum(1).clamp(min=1)


@dataclass
class Blocks:
    """Last prompt token beside the picture's mean, each divided by its spread over a bank: (B, 2 f).

    spread: (2,) float32 root mean squared distance of the bank's blocks from their mean.
    """

    spread: Tensor

    def __call__(self, act: Tensor, batch: Batch) -> Tensor:
        blocks = (last(act, batch), over_picture(act, batch))
        return torch.cat([x / s for x, s in zip(blocks, self.spread.to(act.device))], 1)


def spread_of(bank: Tensor) -> Tensor:
    """(2,) the spread of each half of raw keys (n, 2 f); 1 for a half that does not vary."""
    halves = torch.stack(bank.double().chunk(2, 1)) if len(bank) else torch.zeros(2, 1, 1)
    spread = (halves - halves.mean(1, keepdim=True)).square().sum(2).mean(1).sqrt()
    return torch.where(spread > 0, spread, 1.0).float()


def mean(act: Tensor, batch: Batch) -> Tensor:
    """(B, f) float32 mean over all prompt positions, the picture's included."""
    return mean_over_prompt(act, batch)


@timed("keys")
@torch.no_grad()
def read(prefixes: ImagePrefixes, asks: Sequence[Ask], key: Callable[[Tensor, Batch], Tensor]) -> Tensor:
    """(n, width) float32 keys of prompts on the CPU, many a forward; none of them holds an answer."""
    out: dict[int, Tensor] = {}
    for chunk in _chunks(asks):
        batch = prefixes.collate([asks[i] for i in chunk])
        act = prefixes.activations(batch)
        out.update(zip(chunk, key(act, batch.on(act.device)).cpu()))
    return torch.stack([out[i] for i in range(len(asks))])


def _chunks(asks: Sequence[Ask]) -> list[list[int]]:
    """Indices in batches, pictures apart from text."""
    parts = [[i for i, a in enumerate(asks) if (a.image is None) == text] for text in (True, False)]
    return [part[at : at + _ROWS] for part in parts for at in range(0, len(part), _ROWS)]


def slack(key: Tensor, metric: Metric) -> float:
    """How far apart two readings of one prompt may lie: a radius is never smaller."""
    return 1e-4 * float(key.norm()) if metric == "euclidean" else 1e-6


class Plain:
    """A picture of one colour, of the size of another."""

    def __init__(self, shape: tuple[int, ...], value: int) -> None:
        self.shape, self.value = shape, value
        self.key = f"plain-{value}-{shape[0]}x{shape[1]}"

    def load(self) -> np.ndarray:
        return np.full(self.shape, self.value, dtype=np.uint8)


class Dimmed:
    """Another picture at nine tenths of its brightness."""

    def __init__(self, key: str, pixels: np.ndarray) -> None:
        self.key, self._pixels = f"dimmed-{key}", pixels

    def load(self) -> np.ndarray:
        return (self._pixels.astype(np.float32) * 0.9).round().astype(np.uint8)
