"""Losses of vectors put in the place of one layer's output at prompt positions.

A vector at the last prompt position changes nothing before it: the prompt, its picture included, is run once
and kept as keys and values, and training re-runs the columns from there on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from testbed.core.events import Ask
from testbed.model.answer_loss import answer_loss
from testbed.model.encoding import answer_ids, collate, prompt_inputs
from testbed.model.handle import ModelHandle, project
from testbed.model.prefix_cache import Stems
from testbed.model.reference_mode import watch
from testbed.model.suffix import Tail, capture, row_mean
from testbed.model.suffix_columns import behind

Losses = Callable[[Tensor], Tensor]
"""Vectors (B, d) to losses (B,), nats a token of each row's answer, its end token included."""


def at_last(stems: Stems, asks: list[Ask], targets: list[str], layer: int, acts: Tensor) -> Losses:
    """In the place of the output at the last prompt position. acts: (B, f) what enters the layer there.

    Raises `UnknownLayout` for a layer that does not add the projection's output to the rest of its own.
    """
    handle = stems.handle
    layer = handle.layer_index(layer)
    if layer == handle.n_layers - 1:  # nothing lies above but the head: a tail is as short
        return at_prompt(stems, asks, targets, layer, last=True)
    if layer not in handle.cache.get("tails", ()):
        capture(handle, asks[:1], targets[:1], layer)  # looks at the layer's form
    ends = [prompt_inputs(handle, a)["input_ids"].shape[1] - 1 for a in asks]
    batch = collate(handle, asks, [answer_ids(handle, a, t) for a, t in zip(asks, targets)], end=True, at=ends)
    above, column, at = behind(handle, batch, layer + 1, max(ends)), max(ends), batch.before_answer
    own = _own(handle, layer, acts.to(handle.place(layer), handle.dtype))
    row, ids = at.nonzero()[:, 0], batch.answer_ids

    def losses(vectors: Tensor) -> Tensor:
        each, _ = answer_loss(handle, above.ends(vectors - own, column, at), ids)
        return watch(row_mean(each, row, len(asks)))

    return losses


def at_prompt(stems: Stems, asks: list[Ask], targets: list[str], layer: int, last: bool = False) -> Losses:
    """In the place of the output at all prompt positions (with `last`, at the last)."""
    tail = capture(stems.handle, asks, targets, layer, stems=stems)
    own = _own(stems.handle, tail.layer, tail.act)
    places, row = _places(tail, last)
    return lambda vectors: tail.loss(lambda act: own.index_put(places, vectors[row].to(own.dtype)))


@torch.no_grad()
def _own(handle: ModelHandle, layer: int, act: Tensor) -> Tensor:
    return project(handle.down(layer), act, handle.parameter(handle.down_weight(layer)).detach())


def _places(tail: Tail, last: bool) -> tuple[tuple[Tensor, ...], Tensor]:
    """Where vectors go among the tail's activations, and which row's each is."""
    batch = tail.batch.on(tail.act.device)
    prompt = batch.prompt
    rows = torch.arange(len(prompt), device=prompt.device)
    spots = torch.zeros_like(prompt).index_put((rows, batch.last_prompt), torch.tensor(True, device=prompt.device))
    if tail.act.ndim == 2:  # the last layer keeps the positions before the answer only
        spots = spots[batch.before_answer]
        return (spots.nonzero()[:, 0],), tail.row[spots]
    places = (spots if last else prompt).nonzero(as_tuple=True)
    return places, places[0]
