"""Pictures decoded in worker threads, a few ahead of their use."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from testbed.core.events import BadPicture, Picture

WORKERS, AHEAD = 4, 8
"""Threads, and the most pictures that are decoded and not yet used, which bounds the memory."""


@dataclass(frozen=True)
class Decoded:
    """A picture whose pixels are in memory (satisfies `testbed.core.events.Picture`)."""

    key: str
    pixels: np.ndarray
    where: str = ""
    """Where it was read, for messages."""

    def load(self) -> np.ndarray:
        return self.pixels


def decoded(pictures: Iterable[Picture]) -> Iterator[Decoded | BadPicture]:
    """Each picture decoded once, in order; the error for one that cannot be decoded."""
    waiting: deque[Future[Decoded | BadPicture]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        for picture in pictures:
            waiting.append(pool.submit(_decode, picture))
            if len(waiting) >= AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def place_of(picture: Picture) -> str:
    """The path of a picture's file where it has one, else its key."""
    return str(getattr(picture, "where", "") or getattr(picture, "path", picture.key))


def _decode(picture: Picture) -> Decoded | BadPicture:
    try:
        return Decoded(picture.key, picture.load(), place_of(picture))
    except BadPicture as e:
        return e
