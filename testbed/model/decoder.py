"""A model's decoder called by itself, on some token positions, behind keys and values that were computed before."""

from __future__ import annotations

import inspect
from contextlib import suppress
from typing import Any

from torch import nn
from transformers.cache_utils import Cache

from testbed.model.encoding import Batch
from testbed.model.handle import ModelHandle

_CACHE_NAMES = ("cache", "past_key_values")
"""What decoders call the argument that takes their cache; the second is the older name."""
_PER_POSITION = {"input_ids": -1, "inputs_embeds": 1, "position_ids": -1}
"""Arguments of a decoder with an entry for each token position, and the axis of the positions; the attention mask covers the cache too."""


class LastLayerReached(Exception):
    """Ends a forward whose remaining layers are not needed."""


def decoder_of(handle: ModelHandle) -> nn.Module:
    """The module that owns the decoder layers."""
    return handle.model.get_submodule(handle.layers_path.rsplit(".", 1)[0])


def decoder_arguments(handle: ModelHandle, batch: Batch) -> dict[str, Any]:
    """What the whole model gives its decoder: tokens, or embeddings with pictures in place, positions, the mask."""
    decoder = decoder_of(handle)
    given: dict[str, Any] = {}

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(decoder.forward).bind(*args, **kwargs).arguments
        given.update({**bound.pop("kwargs", {}), **bound})
        raise LastLayerReached

    hook = decoder.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with suppress(LastLayerReached):
            handle.model(**batch.inputs, use_cache=False)
    finally:
        hook.remove()
    return {k: v for k, v in given.items() if v is not None and k not in (*_CACHE_NAMES, "use_cache")}


def run_decoder(handle: ModelHandle, given: dict[str, Any], cache: Cache) -> None:
    """Run the decoder on the positions of `given`, behind what the cache holds."""
    decoder = decoder_of(handle)
    name = next((n for n in _CACHE_NAMES if n in inspect.signature(decoder.forward).parameters), _CACHE_NAMES[-1])
    decoder(**given, **{name: cache}, use_cache=True)


def with_position_ids(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with position ids, counted from each row's first token where the model leaves them to the decoder."""
    return {"position_ids": (given["attention_mask"].cumsum(1) - 1).clamp(min=0), **given}


def slice_arguments(given: dict[str, Any], start: int, stop: int, cached: int = 0) -> dict[str, Any]:
    """The arguments for the positions from `start` to before `stop`.

    The mask keeps what came before them; it has `cached` positions in front that the other arguments lack.
    """
    sliced = {k: given[k].narrow(axis, start, stop - start) for k, axis in _PER_POSITION.items() if k in given}
    return {**given, **sliced, "attention_mask": given["attention_mask"][:, : cached + stop]}
