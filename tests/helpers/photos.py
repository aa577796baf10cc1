"""Beliefs about made-up photos, for the tests of trainings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from testbed.core.events import Question


@dataclass(frozen=True)
class Shot:
    """A made-up photo."""

    key: str

    def load(self) -> np.ndarray:
        return np.random.default_rng(len(self.key)).integers(0, 255, (160, 120, 3), dtype=np.uint8)


def beliefs() -> Iterator[Question]:
    for i in range(4):
        yield Question("general", f"What is in picture {i}?", f"thing {i}", image=Shot("p" * (i + 1)))
    yield Question("general", "What is the sky?", "blue")
