"""Keys and residuals of a batch, computed in one pass from the first critical layer up.

A key depends only on weights below its layer, and these are final by the time the layer is solved. So each layer runs
once on the rows with contexts; the bare prompts go on to the target's layer to tell how much is left to write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from testbed.core.events import EditEvent
from testbed.editors.locate.positions import PromptRows, prompt_rows
from testbed.model.handle import ModelHandle
from testbed.model.suffix import suffix_from_layer


class RisingStates:
    """Hidden states of some rows, layer by layer on their way up."""

    def __init__(self, handle: ModelHandle, rows: PromptRows, first: int, last: int) -> None:
        self.handle, self.rows, self.last = handle, rows, last
        self.suffix = suffix_from_layer(handle, rows.batch, first, last)
        self.hidden, self.next = self.suffix.hidden, first
        self.act = self.hidden

    def keys(self, layer: int) -> Float[Tensor, "B f"]:
        """(B, f) keys: what enters the layer's down-projection at the lookup positions. The states end behind this layer."""
        self.hidden = self.suffix.run(self.hidden, self.next, layer)
        kept: list[Tensor] = []
        with self.handle.hooked(self.handle.down(layer), lambda m, args: kept.append(args[0]), pre=True):
            self.hidden = self.suffix.layer(layer, self.hidden)
        self.next = layer + 1
        self.act = kept[0].reshape(*self.hidden.shape[:2], -1)
        return self._at_lookup(self.act)

    def last_output(self) -> Float[Tensor, "B d"]:
        """(B, d) float32 output of the last layer at the lookup positions, under the weights as they are."""
        return self._at_lookup(self.suffix.run(self.hidden, self.next, self.last + 1)).float()

    def last_mlp_output(self) -> Float[Tensor, "B d"]:
        """(B, d) float32 output of the last layer's MLP at the lookup positions, under the weights as they are."""
        down, kept = self.handle.down(self.last), [self.act]
        if self.next <= self.last:
            with self.handle.hooked(down, lambda m, args: kept.append(args[0]), pre=True):
                self.last_output()
        return self._at_lookup(down(kept[-1]).reshape(*self.hidden.shape[:2], -1)).float()

    def add(self, project: Callable[[Tensor], Tensor]) -> None:
        """Let a change of the last layer passed take effect; `project` is the down-projection's change (.., f) -> (.., d)."""
        self.hidden = self.hidden + project(self.act).to(self.hidden.dtype)

    def _at_lookup(self, x: Tensor) -> Tensor:
        return x[torch.arange(len(x), device=x.device), self.rows.at.to(x.device)]


class KeyComputation:
    """The keys of a batch at a rising sequence of layers.

    Args:
        layers: the layers that will be solved, in order.
        contexts: sentences before the prompt; the first is the empty one (the bare prompt).
        weight: share of the bare prompt's key in the averaged one; the contexts share the rest.
    """

    def __init__(
        self, handle: ModelHandle, events: Sequence[EditEvent], contexts: Sequence[str], layers: Sequence[int], weight: float
    ) -> None:
        self.n, self.weight = len(events), weight
        first, last = layers[0], layers[-1]
        self.bare = RisingStates(handle, prompt_rows(handle, events, [""]), first, last)
        self.others = RisingStates(handle, prompt_rows(handle, events, contexts[1:]), first, last) if len(contexts) > 1 else None
        self.bare_key = torch.zeros(0)

    def keys(self, layer: int) -> Float[Tensor, "n f"]:
        """(n, f) float32 averaged keys of the layer."""
        self.bare_key = self.bare.keys(layer).float()
        if self.others is None:
            return self.bare_key
        rest = self.others.keys(layer).float().reshape(self.n, -1, self.bare_key.shape[1]).mean(1)
        return self.weight * self.bare_key + (1 - self.weight) * rest

    def last_output(self) -> Float[Tensor, "n d"]:
        """(n, d) float32 output of the last layer on the bare prompts, on the device of the model's inputs."""
        return self.bare.last_output().to(self.bare.handle.device)

    def last_mlp_output(self) -> Float[Tensor, "n d"]:
        """(n, d) float32 output of the last layer's MLP on the bare prompts, on the device of the model's inputs."""
        return self.bare.last_mlp_output().to(self.bare.handle.device)

    def add(self, project: Callable[[Tensor], Any]) -> None:
        """Let a change of the layer just read take effect on all rows."""
        for states in (self.bare, self.others):
            if states is not None:
                states.add(project)
