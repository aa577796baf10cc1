"""Losses of vectors put in the place of one layer's output at prompt positions.

A vector at the last prompt position changes nothing before it: the prompt, its picture included, is run once
and kept as keys and values, and training re-runs the columns from there on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from testbed.core.events import Ask
from testbed.model.encoding import answer_ids, collate, prompt_inputs
from testbed.model.handle import ModelHandle, project
from testbed.model.prefix_cache import ImagePrefixes
from testbed.model.suffix import (
    layout_verified,
    suffix_from_down_projection,
    suffix_from_layer,
)

Losses = Callable[[Tensor], Tensor]
"""Vectors (B, d) to losses (B,), nats a token of each row's answer, its end token included."""


def at_last(prefixes: ImagePrefixes, asks: list[Ask], targets: list[str], layer: int, acts: Tensor) -> Losses:
    """In the place of the output at the last prompt position. acts: (B, f) what enters the layer there.

    Raises `UnknownLayout` for a layer that does not add the projection's output to the rest of its own.
    """
    handle = prefixes.handle
    layer = handle.layer_index(layer)
    if layer == handle.n_layers - 1:  # nothing but the head lies above, so that no position behind the answers' is run anyway
        return at_prompt(prefixes, asks, targets, layer, last=True)
    if not layout_verified(handle, layer):
        suffix_from_down_projection(handle, asks[:1], targets[:1], layer)
    ends = [prompt_inputs(handle, a)["input_ids"].shape[1] - 1 for a in asks]
    batch = collate(handle, asks, [answer_ids(handle, a, t) for a, t in zip(asks, targets)], end=True, at=ends)
    position = max(ends)
    suffix = suffix_from_layer(handle, batch, layer + 1, positions=(position, batch.prompt.shape[1]))
    own = _own(handle, layer, acts.to(handle.layer_device(layer), handle.dtype))

    def losses(vectors: Tensor) -> Tensor:
        hidden = suffix.run(suffix.added(vectors - own, position))
        return suffix.answer_losses(suffix.final_hidden(hidden))

    return losses


def at_prompt(prefixes: ImagePrefixes, asks: list[Ask], targets: list[str], layer: int, last: bool = False) -> Losses:
    """In the place of the output at all prompt positions (with `last`, at the last)."""
    suffix = suffix_from_down_projection(prefixes.handle, asks, targets, layer, prefixes=prefixes)
    own = _own(prefixes.handle, suffix.layer, suffix.act)
    batch = suffix.batch
    rows = torch.arange(len(batch.prompt), device=batch.prompt.device)
    last_one = torch.zeros_like(batch.prompt).index_put((rows, batch.last_prompt), torch.tensor(True, device=rows.device))
    places = suffix.at(last_one if last else batch.prompt).nonzero(as_tuple=True)
    return lambda vectors: suffix.losses(lambda act: own.index_put(places, vectors[places[0]].to(own.dtype)))


@torch.no_grad()
def _own(handle: ModelHandle, layer: int, act: Tensor) -> Tensor:
    return project(handle.down(layer), act, handle.parameter(handle.down_weight(layer)).detach())
