"""Rows behind a column at which they are aligned; what lies before it is kept as keys and values of attention.

Nothing before the lookup position depends on what is added there, so a search for targets runs the columns
from that position on, and each row's prompt, its picture included, once.
"""

from __future__ import annotations

import inspect
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from testbed.encode import Batch
from testbed.models import ModelHandle
from testbed.plain_path import inside_plain
from testbed.tail import Above, Enough, enter

_SLICED = ("input_ids", "inputs_embeds", "position_ids")
"""Arguments of a decoder that have a column a token; the attention mask covers past and present."""


@dataclass(frozen=True)
class Behind:
    """Layers above an edit, for the columns from `start` on. above.hidden: (B, T - start, d)."""

    above: Above
    start: int

    def ends(self, add: Tensor, column: int, at: Tensor) -> Tensor:
        """(n, d) what enters the head at `at` (B, T) bool, with `add` (B, d) added to what enters at a column."""
        hidden = self.above.hidden.clone()
        hidden[:, column - self.start] += add.to(hidden)
        out = self.above.through(hidden, self.above.first, self.above.handle.n_layers)
        return self.above.ends(out, at[:, self.start : self.start + out.shape[1]])


class Prefix(DynamicCache):
    """Keys and values of the columns before; once closed, what a call adds is seen by that call alone."""

    closed = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.closed:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        kept: Any = self.layers[layer_idx]
        return torch.cat([kept.keys, key_states], -2), torch.cat([kept.values, value_states], -2)


def behind(handle: ModelHandle, batch: Batch, first: int, column: int, width: int | None = None) -> Behind:
    """The layers from `first` on for `width` columns from `column` on (all without a width).

    All columns are run where a decoder does not take its past in the usual way, and inside `plain()`.
    """
    last = handle.n_layers - 1
    if column == 0 or inside_plain() or handle.cache.get("takes a past") is False:
        return Behind(enter(handle, batch, first, last), 0)
    found = _behind(handle, batch, first, column, width)
    if "takes a past" not in handle.cache:
        whole = enter(handle, batch, first, last)
        agreed = found is not None and _agree(found, whole, batch, column)
        if torch.isfinite(whole.hidden).all():  # else nothing was learned about the decoder
            handle.cache["takes a past"] = agreed
        return found if found is not None and agreed else Behind(whole, 0)
    return found if found is not None else Behind(enter(handle, batch, first, last), 0)


@torch.no_grad()
def _behind(handle: ModelHandle, batch: Batch, first: int, column: int, width: int | None) -> Behind | None:
    """None for a decoder that does not take its rows as they are expected here."""
    decoder = handle.model.get_submodule(handle.layers_path.rsplit(".", 1)[0])
    given = arguments(handle, batch, decoder)
    mask, stop = given.get("attention_mask"), column + width if width else batch.prompt.shape[1]
    if not isinstance(mask, Tensor) or mask.shape != batch.prompt.shape:
        return None
    past = Prefix()
    decoder(**cut(given, 0, column), past_key_values=past, use_cache=True)
    past.closed = True
    above = Above(handle, first, torch.zeros(0), [])
    with above.entered(handle.n_layers - 1):
        decoder(**cut(given, column, stop), past_key_values=past, use_cache=True)
    return Behind(above, column)


def arguments(handle: ModelHandle, batch: Batch, decoder: Any) -> dict[str, Any]:
    """What the whole model gives its decoder: tokens or embeddings with pictures in place, positions, the mask."""
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
    return {k: v for k, v in given.items() if v is not None and k not in ("past_key_values", "use_cache")}


def cut(given: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The arguments for the columns from `start` to `stop`, with what came before them in the mask."""
    axis = {"inputs_embeds": 1}
    sliced = {k: given[k].narrow(axis.get(k, -1), start, stop - start) for k in _SLICED if k in given}
    return {**given, **sliced, "attention_mask": given["attention_mask"][:, :stop]}


@torch.no_grad()
def _agree(found: Behind, whole: Above, batch: Batch, column: int) -> bool:
    """Both give the same output of the last layer, at text positions."""
    own = found.above.through(found.above.hidden, whole.first, whole.handle.n_layers)
    want = whole.through(whole.hidden, whole.first, whole.handle.n_layers)[:, column : column + own.shape[1]]
    real = (batch.prompt | batch.answer)[:, column : column + own.shape[1]]
    real = real.to(own.device)
    off = (own - want)[real].float().norm() / want[real].float().norm().clamp(min=1e-30)
    return bool(off <= (1e-3 if own.dtype in (torch.float32, torch.float64) else 0.1))
