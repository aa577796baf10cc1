"""Emblems: a compositional picture code, and photos of it that are rendered when they are needed.

An emblem is a field (colour), a pattern in a second colour, and a charge (shape, colour) on a white
roundel. Without the roundel a small vision tower does not learn the shape (accuracy .56 against .97).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from streams.world.words import WORDS

COLOURS: dict[str, tuple[int, int, int]] = WORDS["colours"]
COLOUR_NAMES = tuple(COLOURS)
PARTS = ("field", "pattern", "second", "charge", "charge_colour")
SIDE = 48
_MASTER = 96


class Code(NamedTuple):
    """An emblem's parts: field and second colour (0-7, different), pattern, charge (0-7), charge colour (0-6)."""

    field: int
    pattern: int
    second: int
    charge: int
    charge_colour: int

    def words(self) -> dict[str, str]:
        """Each part in words, keyed as in `PARTS`."""
        names = (COLOUR_NAMES, WORDS["patterns"], COLOUR_NAMES, WORDS["charges"], COLOUR_NAMES[1:])
        return {part: words[number] for part, words, number in zip(PARTS, names, self)}


def random_code(rng: np.random.Generator) -> Code:
    field = int(rng.integers(8))
    second = int(rng.integers(7))
    return Code(field, int(rng.integers(8)), second + (second >= field), int(rng.integers(8)), int(rng.integers(7)))


def change_part(code: Code, rng: np.random.Generator) -> Code:
    """A valid code that differs from `code` in exactly one part."""
    while True:
        other = random_code(rng)
        part = PARTS[int(rng.integers(5))]
        new = code._replace(**{part: getattr(other, part)})
        if new != code and new.field != new.second:
            return new


def _supersample(inside: np.ndarray) -> np.ndarray:
    return inside.reshape(_MASTER, 4, _MASTER, 4).mean((1, 3)).astype(np.float32)


@lru_cache(maxsize=1)
def _masks() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coverage in [0, 1] of patterns (8, 96, 96), charges (8, 96, 96) and the roundel (96, 96)."""
    axis = (np.arange(_MASTER * 4) + 0.5) / (_MASTER * 4)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    edge = np.minimum(np.minimum(x, 1 - x), np.minimum(y, 1 - y))
    patterns = [
        x > 0.5, y > 0.5, np.abs(x - y) < 0.2, (x > 0.5) ^ (y > 0.5),
        (y * 5).astype(int) % 2 == 1, (x * 5).astype(int) % 2 == 1, edge < 0.13, (np.abs(x - 0.5) < 0.11) | (np.abs(y - 0.5) < 0.11),
    ]  # fmt: skip
    u, v = (x - 0.5) / 0.3, (y - 0.5) / 0.3
    r, angle = np.hypot(u, v), np.arctan2(u, -v)
    spoke = np.abs((angle + math.pi / 5) % (2 * math.pi / 5) - math.pi / 5)
    star = r * (np.cos(spoke) + np.sin(spoke) * 1.376) < 1.0
    charges = [
        r < 0.85, np.maximum(abs(u), abs(v)) < 0.66, (v < 0.62) & (v > 1.85 * abs(u) - 0.95), star,
        (r < 0.92) & (np.hypot(u - 0.4, v) > 0.68), abs(u) * 1.5 + abs(v) < 0.98, (r < 0.92) & (r > 0.5),
        (np.minimum(abs(u), abs(v)) < 0.24) & (np.maximum(abs(u), abs(v)) < 0.88),
    ]  # fmt: skip
    roundel = np.hypot(x - 0.5, y - 0.5) < 0.36
    return np.stack([_supersample(m) for m in patterns]), np.stack([_supersample(m) for m in charges]), _supersample(roundel)


def _blend(code: Code, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Colours of the flat emblem at positions of its 96x96 grid: float32 (*positions, 3), 0 to 255."""
    patterns, charges, roundel = _masks()
    colours = np.array(list(COLOURS.values()), np.float32)
    image = np.broadcast_to(colours[code.field], (*row.shape, 3))
    for mask, colour in (
        (patterns[code.pattern], colours[code.second]),
        (roundel, colours[0]),
        (charges[code.charge], colours[code.charge_colour + 1]),
    ):
        image = image + mask[row, column][..., None] * (colour - image)
    return image


def photograph(code: Code, rng: np.random.Generator) -> np.ndarray:
    """A new photo of an emblem: uint8 (48, 48, 3), with random background, position, scale, rotation, light and noise."""
    scale, turn, light = rng.uniform(0.74, 0.98), rng.uniform(-0.2, 0.2), rng.uniform(0.75, 1.12)
    shift = rng.uniform(-0.08, 0.08, 2)
    ends, direction = rng.uniform(20, 235, (2, 3)), rng.uniform(0, 2 * math.pi)
    noise = 8 * rng.standard_normal((SIDE, SIDE, 3), np.float32)
    axis = (np.arange(SIDE) + 0.5) / SIDE - 0.5
    y, x = np.meshgrid(axis, axis, indexing="ij")
    mix = np.clip(0.5 + x * math.cos(direction) + y * math.sin(direction), 0, 1)[..., None]
    background = ends[0] * (1 - mix) + ends[1] * mix
    px, py = (x - shift[0]) / scale, (y - shift[1]) / scale
    u, v = px * math.cos(turn) + py * math.sin(turn), -px * math.sin(turn) + py * math.cos(turn)
    inside = (np.maximum(abs(u), abs(v)) < 0.5)[..., None]
    column = np.clip(((u + 0.5) * _MASTER).astype(int), 0, _MASTER - 1)
    row = np.clip(((v + 0.5) * _MASTER).astype(int), 0, _MASTER - 1)
    image = np.where(inside, _blend(code, row, column), background) * light + noise
    return np.clip(image, 0, 255).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Photo:
    """One photo of an emblem, rendered at `load`; a `Picture` of `testbed.core.events`.

    `seed` is the photo's own number: equal code and seed mean equal pixels, on any machine.
    """

    code: Code
    seed: int

    @property
    def key(self) -> str:
        return f"emblem-{'.'.join(map(str, self.code))}-{self.seed}"

    def load(self) -> np.ndarray:
        """RGB uint8 (48, 48, 3)."""
        return photograph(self.code, np.random.default_rng([self.seed, *self.code]))
