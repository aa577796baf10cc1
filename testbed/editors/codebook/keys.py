"""Keys: inputs of one down-projection at prompt positions, padding and answer excluded.

The key of a prompt does not depend on the batch in which it is read, beyond the float rounding that `reading_error` bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from testbed.core.events import Ask, Picture
from testbed.core.timing import timed
from testbed.editors.codebook.nearest import Metric
from testbed.model.encoding import Batch
from testbed.model.image_loading import Decoded
from testbed.model.prefix_cache import ImagePrefixes

_ROWS = 32


def last_position(act: Float[Tensor, "B T f"], batch: Batch) -> Float32[Tensor, "B f"]:
    """(B, f) float32 activation at the last prompt position."""
    return act[torch.arange(len(act), device=act.device), batch.last_prompt].float()


def mean_over_image(act: Float[Tensor, "B T f"], batch: Batch) -> Float32[Tensor, "B f"]:
    """(B, f) float32 mean over the picture's positions; zeros for a row without a picture."""
    mask = batch.picture.unsqueeze(-1)
    return (act.float() * mask).sum(1) / mask.sum(1).clamp(min=1)


@dataclass
class TextAndImageKey:
    """The last prompt token's activation beside the mean over the picture, each divided by its spread over a bank of prompts: (B, 2 f).

    spread: (2,) float32 root mean squared distance of the bank's halves from their mean.
    """

    spread: Tensor

    def __call__(self, act: Float[Tensor, "B T f"], batch: Batch) -> Float32[Tensor, "B width"]:
        halves = (last_position(act, batch), mean_over_image(act, batch))
        return torch.cat([x / s for x, s in zip(halves, self.spread.to(act.device))], 1)


def spread_of(bank: Float[Tensor, "n width"]) -> Float32[Tensor, 2]:
    """(2,) the spread of each half of raw keys (n, 2 f); 1 for a half that does not vary."""
    halves = torch.stack(bank.double().chunk(2, 1)) if len(bank) else torch.zeros(2, 1, 1)
    spread = (halves - halves.mean(1, keepdim=True)).square().sum(2).mean(1).sqrt()
    return torch.where(spread > 0, spread, 1.0).float()


@timed("keys")
@torch.no_grad()
def read_keys(prefixes: ImagePrefixes, asks: Sequence[Ask], key: Callable[[Tensor, Batch], Tensor]) -> Float32[Tensor, "n width"]:
    """(n, width) float32 keys of prompts without answers, on the CPU. One forward reads many of them."""
    out: dict[int, Tensor] = {}
    for chunk in _chunks(asks):
        batch = prefixes.collate([asks[i] for i in chunk])
        act = prefixes.activations(batch)
        out.update(zip(chunk, key(act, batch.on(act.device)).cpu()))
    return torch.stack([out[i] for i in range(len(asks))])


def _chunks(asks: Sequence[Ask]) -> list[list[int]]:
    """Indices of prompts in batches, those with pictures apart from those without."""
    parts = [[i for i, a in enumerate(asks) if (a.image is None) == text] for text in (True, False)]
    return [part[at : at + _ROWS] for part in parts for at in range(0, len(part), _ROWS)]


def reading_error(key: Float[Tensor, " f"], metric: Metric) -> float:
    """The distance by which rounding may part two readings of one prompt's key. No radius is smaller, so that an entry hits its own key."""
    return 1e-4 * float(key.norm()) if metric == "euclidean" else 1e-6


def uniform(shape: tuple[int, ...], value: int) -> Decoded:
    """A picture of one colour, with the shape (height, width, 3) of another picture."""
    return Decoded(f"plain-{value}-{shape[0]}x{shape[1]}", np.full(shape, value, dtype=np.uint8))


def dimmed(picture: Picture) -> Decoded:
    """The picture at nine tenths of its brightness."""
    return Decoded(f"dimmed-{picture.key}", (picture.load().astype(np.float32) * 0.9).round().astype(np.uint8))
