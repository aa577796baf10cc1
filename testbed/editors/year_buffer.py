"""Edits that wait for the end of their year: what an editor that trains once a year keeps of them, pictures included.

Of several edits of one fact the newest is kept. The content is part of the editor's state, so that a run that is killed within
a year goes on with the same edits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from testbed.core.events import Ask, EditEvent, Picture, content_id

_PIXELS = "waiting.pixels."
"""Beginning of the names of pictures in a state."""


@dataclass(frozen=True)
class KeptPicture:
    """A picture whose pixels (H, W, 3) uint8 lie in memory (satisfies `testbed.core.events.Picture`)."""

    key: str
    pixels: Tensor

    def load(self) -> np.ndarray:
        """The pixels as an array (H, W, 3)."""
        return self.pixels.numpy()


def _kept(picture: Picture | None) -> KeptPicture | None:
    """The picture, decoded once."""
    return None if picture is None else KeptPicture(picture.key, torch.from_numpy(np.array(picture.load())))


@dataclass(frozen=True)
class Waiting:
    """An edit as a trainer needs it, under a hash of its fact."""

    fact: str
    ask: Ask
    target: str


@dataclass(frozen=True)
class YearBuffer:
    """The edits of a year so far, oldest first. It is replaced and never changed."""

    waiting: tuple[Waiting, ...] = field(default=())

    def with_edits(self, events: Iterable[EditEvent]) -> YearBuffer:
        """The buffer with more edits; one of a fact that waits already takes its place."""
        kept = {w.fact: w for w in self.waiting}
        for e in events:
            fact = content_id(*e.fact)
            kept.pop(fact, None)
            kept[fact] = Waiting(fact, replace(e.ask(), image=_kept(e.image)), e.target)
        return YearBuffer(tuple(kept.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of the texts and of the decoded pictures."""
        texts = sum(len(text.encode()) for w in self.waiting for text in (w.ask.prompt, w.target))
        return texts + sum(p.pixels.nbytes for p in self._pictures().values())

    def _pictures(self) -> dict[str, KeptPicture]:
        return {w.ask.image.key: w.ask.image for w in self.waiting if isinstance(w.ask.image, KeptPicture)}

    def state(self) -> dict[str, Any]:
        """Tensors and JSON values, for `load`."""
        rows = [[w.fact, w.ask.prompt, w.ask.relation, w.ask.image.key if w.ask.image else None, w.target] for w in self.waiting]
        return {"waiting": rows, **{_PIXELS + key: p.pixels for key, p in self._pictures().items()}}

    @staticmethod
    def load(state: Mapping[str, Any]) -> YearBuffer:
        """The reverse; nothing waits in a state that holds no buffer."""

        def picture(key: str | None) -> KeptPicture | None:
            return KeptPicture(key, state[_PIXELS + key]) if key is not None else None

        rows = state.get("waiting", [])
        return YearBuffer(tuple(Waiting(fact, Ask(prompt, picture(key), relation=relation), t) for fact, prompt, relation, key, t in rows))
