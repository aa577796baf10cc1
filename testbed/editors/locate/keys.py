"""Keys and residuals of a batch in one pass from the first critical layer up.

A key depends only on weights below its layer, and these are final by the time the layer is solved. So each
block runs once on the context rows; the bare rows go on to the target's layer to say how much is left to write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from testbed.core.events import EditEvent
from testbed.editors.locate.positions import Rows, prompt_rows
from testbed.model.handle import ModelHandle
from testbed.model.suffix import enter


class Stream:
    """Hidden states of some rows on their way up."""

    def __init__(self, handle: ModelHandle, rows: Rows, first: int, last: int) -> None:
        self.handle, self.rows, self.last = handle, rows, last
        self.above = enter(handle, rows.batch, first, last)
        self.hidden, self.next = self.above.hidden, first
        self.act = self.hidden

    def read(self, layer: int) -> Tensor:
        """(B, f) keys: what enters the layer's down-projection at the lookup positions. The layer runs, but is not left."""
        self.hidden = self.above.through(self.hidden, self.next, layer)
        kept: list[Tensor] = []
        with self.handle.hooked(self.handle.down(layer), lambda m, args: kept.append(args[0]), pre=True):
            self.hidden = self.above.layer(layer, self.hidden)
        self.next = layer + 1
        self.act = kept[0].reshape(*self.hidden.shape[:2], -1)
        return self._at(self.act)

    def ahead(self) -> Tensor:
        """(B, d) float32 output of the last layer at the lookup positions, under the weights as they are."""
        return self._at(self.above.through(self.hidden, self.next, self.last + 1)).float()

    def ahead_mlp(self) -> Tensor:
        """(B, d) float32 output of the last layer's MLP at the lookup positions, under the weights as they are."""
        down, kept = self.handle.down(self.last), [self.act]
        if self.next <= self.last:
            with self.handle.hooked(down, lambda m, args: kept.append(args[0]), pre=True):
                self.ahead()
        return self._at(down(kept[-1]).reshape(*self.hidden.shape[:2], -1)).float()

    def add(self, project: Callable[[Tensor], Tensor]) -> None:
        """Let a change of the layer just read take effect: `project` is the down-projection's change (.., f) -> (.., d)."""
        self.hidden = self.hidden + project(self.act).to(self.hidden.dtype)

    def _at(self, x: Tensor) -> Tensor:
        return x[torch.arange(len(x), device=x.device), self.rows.at.to(x.device)]


class Sweep:
    """The batch's rows at a rising sequence of layers.

    Args:
        layers: the layers that will be solved, in order.
        contexts: sentences before the prompt; the first is the empty one (the bare prompt).
        weight: share of the bare key in the averaged one; the contexts share the rest.
    """

    def __init__(
        self, handle: ModelHandle, events: Sequence[EditEvent], contexts: Sequence[str], layers: Sequence[int], weight: float
    ) -> None:
        self.n, self.weight = len(events), weight
        first, last = layers[0], layers[-1]
        self.bare = Stream(handle, prompt_rows(handle, events, [""]), first, last)
        self.others = Stream(handle, prompt_rows(handle, events, contexts[1:]), first, last) if len(contexts) > 1 else None
        self.bare_key = torch.zeros(0)

    def read(self, layer: int) -> Tensor:
        """(n, f) float32 averaged keys of the layer."""
        self.bare_key = self.bare.read(layer).float()
        if self.others is None:
            return self.bare_key
        rest = self.others.read(layer).float().reshape(self.n, -1, self.bare_key.shape[1]).mean(1)
        return self.weight * self.bare_key + (1 - self.weight) * rest

    def ahead(self) -> Tensor:
        """(n, d) float32 output of the last layer on the bare prompts, beside the model's inputs."""
        return self.bare.ahead().to(self.bare.handle.device)

    def ahead_mlp(self) -> Tensor:
        """(n, d) float32 output of the last layer's MLP on the bare prompts, beside the model's inputs."""
        return self.bare.ahead_mlp().to(self.bare.handle.device)

    def add(self, project: Callable[[Tensor], Any]) -> None:
        for stream in (self.bare, self.others):
            if stream is not None:
                stream.add(project)
