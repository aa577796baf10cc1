"""A model's decoder called by itself, on some columns, behind others that were run before and are kept."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from testbed.model.encoding import Batch
from testbed.model.handle import ModelHandle
from testbed.model.suffix import Enough

_CACHES = ("cache", "past_key_values")
"""What decoders call their past; the second is the older name."""
SLICED = ("input_ids", "inputs_embeds", "position_ids")
"""Arguments of a decoder that have a column a token; the attention mask covers past and present."""


@dataclass(frozen=True)
class Stem:
    """The P places of one row up to a picture's last.

    past: keys and values of each layer, (1, heads, P, width). act: (P, f) what entered the watched module.
    after: the number of the position behind, along `axes` axes.
    """

    past: list[tuple[Tensor, Tensor]]
    act: Tensor
    after: int
    axes: int

    @property
    def bytes(self) -> int:
        return self.act.nbytes + sum(t.nbytes for pair in self.past for t in pair)


class Past(DynamicCache):
    """The rows' stems side by side, right-aligned and put together when a layer asks, then what was run behind them.

    Once closed, what a call adds is seen by that call alone.
    """

    closed = False

    def __init__(self, stems: Sequence[Stem] = ()) -> None:
        super().__init__()
        self.stems, self.columns = stems, columns_of(stems)
        self.added: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kwargs: Any) -> int:
        return self.columns + (self.added[layer_idx][0].shape[-2] if layer_idx in self.added else 0)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        own = [key_states, value_states]
        if layer_idx in self.added:
            own = [torch.cat(pair, -2) for pair in zip(self.added[layer_idx], own)]
        if not self.closed:
            self.added[layer_idx] = (own[0], own[1])
        if self.stems:
            own = [torch.cat([self._of(layer_idx, i), x], -2) for i, x in enumerate(own)]
        return own[0], own[1]

    def _of(self, layer: int, which: int) -> Tensor:
        return torch.cat([shifted(s.past[layer][which], self.columns) for s in self.stems])


def columns_of(stems: Sequence[Stem]) -> int:
    """The columns that the longest takes."""
    return max((len(s.act) for s in stems), default=0)


def shifted(t: Tensor, columns: int) -> Tensor:
    """Zeros before the second to last axis of (.., P, f), so that it has so many columns."""
    more = columns - t.shape[-2]
    return nn.functional.pad(t, (0, 0, more, 0)) if more else t


def decoder_of(handle: ModelHandle) -> nn.Module:
    """The module that owns the decoder layers."""
    return handle.model.get_submodule(handle.layers_path.rsplit(".", 1)[0])


def arguments(handle: ModelHandle, batch: Batch) -> dict[str, Any]:
    """What the whole model gives its decoder: tokens or embeddings with pictures in place, positions, the mask."""
    decoder = decoder_of(handle)
    given: dict[str, Any] = {}

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(decoder.forward).bind(*args, **kwargs).arguments
        given.update({**bound.pop("kwargs", {}), **bound})
        raise Enough

    hook = decoder.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with suppress(Enough):
            handle.model(**batch.inputs, use_cache=False)
    finally:
        hook.remove()
    return {k: v for k, v in given.items() if v is not None and k not in (*_CACHES, "use_cache")}


def run(handle: ModelHandle, given: dict[str, Any], past: Past) -> None:
    """The decoder on columns behind what `past` holds."""
    decoder = decoder_of(handle)
    name = next((n for n in _CACHES if n in inspect.signature(decoder.forward).parameters), _CACHES[-1])
    decoder(**given, **{name: past}, use_cache=True)


def numbered(given: dict[str, Any]) -> dict[str, Any]:
    """The same with the positions' numbers, counted from each row's first token, where the model leaves them to the decoder."""
    return {"position_ids": (given["attention_mask"].cumsum(1) - 1).clamp(min=0), **given}


def cut(given: dict[str, Any], start: int, stop: int, held: int = 0) -> dict[str, Any]:
    """The arguments for the columns from `start` to `stop`, with what came before them in the mask, which has `held` columns more."""
    axis = {"inputs_embeds": 1}
    sliced = {k: given[k].narrow(axis.get(k, -1), start, stop - start) for k in SLICED if k in given}
    return {**given, **sliced, "attention_mask": given["attention_mask"][:, : held + stop]}
