"""The decoder called by itself, behind keys and values for token positions that stand first: a prompt's, or its picture's.

A picture stands first in a prompt, and no word behind it changes what it leaves in a decoder. So its positions are run
once, and of a further prompt about the same picture the words alone. Where that saves nothing, where not every row has
a picture, and for a decoder that does not take a cache in the usual way, all positions are run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from testbed.core.events import Ask
from testbed.model.encoding import Batch, collate, image_token, prompt_inputs
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


def takes_slices(given: dict[str, Any], positions: int) -> bool:
    """Whether the mask and what `slice_arguments` cuts are all that a decoder is given for each token position.

    Others hold a mask a kind of layer, or tell where in the batch pictures lie (Gemma 3, Qwen3-VL).
    """
    mask = given.get("attention_mask")
    others = [t for name, t in given.items() if isinstance(t, Tensor) and name not in (*_PER_POSITION, "attention_mask")]
    return isinstance(mask, Tensor) and mask.ndim == 2 and not any(positions in t.shape[1:] for t in others)


def run_decoder(handle: ModelHandle, given: dict[str, Any], cache: Cache) -> Tensor:
    """(B, P, d) final hidden states of the decoder on the positions of `given`, behind what the cache holds."""
    decoder = decoder_of(handle)
    name = next((n for n in _CACHE_NAMES if n in inspect.signature(decoder.forward).parameters), _CACHE_NAMES[-1])
    return decoder(**given, **{name: cache}, use_cache=True)[0]


def with_position_ids(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with position ids, counted from each row's first token where the model leaves them to the decoder."""
    return {"position_ids": (given["attention_mask"].cumsum(1) - 1).clamp(min=0), **given}


def slice_arguments(given: dict[str, Any], start: int, stop: int, cached: int = 0) -> dict[str, Any]:
    """The arguments for the positions from `start` to before `stop`.

    The mask keeps what came before them; it has `cached` positions in front that the other arguments lack.
    """
    sliced = {k: given[k].narrow(axis, start, stop - start) for k, axis in _PER_POSITION.items() if k in given}
    return {**given, **sliced, "attention_mask": given["attention_mask"][:, : cached + stop]}


T = TypeVar("T")
_CPU_BYTES, _GPU_SHARE = 2 << 30, 8
"""Bytes that image prefixes may take together on a CPU, and the part of a GPU's memory (an eighth); the longest unused leave first."""
_FLAG = "takes image prefixes"


@dataclass(frozen=True)
class ImagePrefix:
    """The P token positions of one prompt up to the last of its picture.

    layers: keys and values of each decoder layer, (1, heads, P, width) each. act: (P, f) what entered the watched module.
    next_position: the position id behind them, along `axes` axes (some families number height and width apart).
    """

    layers: list[tuple[Tensor, Tensor]]
    act: Tensor
    next_position: int
    axes: int

    @property
    def bytes(self) -> int:
        return self.act.nbytes + sum(t.nbytes for pair in self.layers for t in pair)


class PrefixCache(DynamicCache):
    """The rows' image prefixes, right-aligned, then the keys and values of what was run behind them.

    Once frozen, what a forward adds is seen by that forward alone, so that the same prefix serves every step of a search.
    """

    frozen = False

    def __init__(self, images: Sequence[ImagePrefix] = ()) -> None:
        super().__init__()
        self.images, self.image_positions = images, longest(images)
        self.added: dict[int, tuple[Tensor, Tensor]] = {}

    def get_seq_length(self, layer_idx: int = 0, *args: Any, **kwargs: Any) -> int:
        return self.image_positions + (self.added[layer_idx][0].shape[-2] if layer_idx in self.added else 0)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        own = [key_states, value_states]
        if layer_idx in self.added:
            own = [torch.cat(pair, -2) for pair in zip(self.added[layer_idx], own)]
        if not self.frozen:
            self.added[layer_idx] = (own[0], own[1])
        if self.images:
            own = [torch.cat([self._image_states(layer_idx, i), x], -2) for i, x in enumerate(own)]
        return own[0], own[1]

    def _image_states(self, layer: int, which: int) -> Tensor:
        return torch.cat([right_aligned(p.layers[layer][which], self.image_positions) for p in self.images])


def longest(prefixes: Sequence[ImagePrefix]) -> int:
    """Token positions of the longest prefix; 0 where there is none."""
    return max((len(p.act) for p in prefixes), default=0)


def right_aligned(t: Tensor, positions: int) -> Tensor:
    """Zeros in front along the second to last axis of (.., P, f), so that it has so many positions."""
    more = positions - t.shape[-2]
    return nn.functional.pad(t, (0, 0, more, 0)) if more else t


def agree(got: Tensor, want: Tensor) -> bool:
    """Whether two readings of the same activations differ by rounding alone."""
    off = (got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-30)
    return bool(off <= (1e-3 if want.dtype in (torch.float32, torch.float64) else 0.1))


class ImagePrefixes:
    """Forwards of the unedited model that run a picture's positions once, and what enters one of its modules there."""

    def __init__(self, handle: ModelHandle, module: nn.Module, limit: int | None = None) -> None:
        self.handle, self.module = handle, module
        self.limit = _byte_limit(handle.device) if limit is None else limit
        self.kept: dict[tuple[Any, ...], ImagePrefix] = {}
        self._brief = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(handle.model.forward).parameters else {}

    def collate(self, asks: Sequence[Ask], answers: Sequence[Sequence[int]] | None = None, end: bool = False) -> Batch:
        """As `encoding.collate`, with the last positions of pictures in one column."""
        if any(a.image is None for a in asks):
            return collate(self.handle, asks, answers, side="left" if answers is None else "right", end=end)
        return collate(self.handle, asks, answers, end=end, at=[self._length(a) - 1 for a in asks])

    @torch.no_grad()
    def forward(self, batch: Batch) -> int:
        """Run a batch made by `collate`; the token position from which on modules were given activations last."""
        return longest(self._run(batch))

    @torch.no_grad()
    def activations(self, batch: Batch) -> Tensor:
        """(B, T, f) what enters the module when a batch made by `collate` is run."""
        prefixes, act = self._watched(lambda: self._run(batch))
        act = act.reshape(len(batch.prompt), -1, act.shape[-1])
        return torch.cat([torch.stack([right_aligned(p.act, longest(prefixes)) for p in prefixes]), act], 1) if prefixes else act

    def _run(self, batch: Batch) -> list[ImagePrefix]:
        """The prefixes that the words were run behind; none where all positions were run."""
        if all(a.image is not None for a in batch.asks) and self.saves_work(batch.asks):
            if _FLAG not in self.handle.cache:
                self._compare(batch)
            if self.handle.cache.get(_FLAG):
                prefixes = self.of(batch.asks)
                self._run_words(batch, prefixes)
                return prefixes
        self._run_all(batch)
        return []

    def saves_work(self, asks: Sequence[Ask]) -> bool:
        """Whether a picture occurs twice, or was run before."""
        names = {self._name(a) for a in asks}
        return len(names) < len(asks) or not names.isdisjoint(self.kept)

    def _run_all(self, batch: Batch) -> None:
        self.handle.model(**batch.inputs, use_cache=False, **self._brief)

    def _watched(self, work: Callable[[], T]) -> tuple[T, Tensor]:
        """The result of some work, and what entered the module in its last call."""
        seen: list[Tensor] = []
        with self.handle.hooked(self.module, lambda m, args: seen.append(args[0]), pre=True):
            out = work()
        return out, seen[-1]

    def _length(self, ask: Ask) -> int:
        """P of a prompt, from its tokens."""
        return int((prompt_inputs(self.handle, ask)["input_ids"][0] == image_token(self.handle)).nonzero().max()) + 1

    def _name(self, ask: Ask) -> tuple[Any, ...]:
        key = "" if ask.image is None else ask.image.key
        return (key, *prompt_inputs(self.handle, ask)["input_ids"][0, : self._length(ask)].tolist())

    def of(self, asks: Sequence[Ask]) -> list[ImagePrefix]:
        """The prefix of each prompt; those that are not kept are computed together."""
        named = {self._name(a): a for a in asks}
        new = {name: a for name, a in named.items() if name not in self.kept}
        found = {name: self.kept.pop(name) for name in named if name in self.kept}
        found |= dict(zip(new, self._compute(list(new.values())))) if new else {}
        self.kept |= found
        while sum(p.bytes for p in self.kept.values()) > self.limit:
            self.kept.pop(next(iter(self.kept)))
        return [found[self._name(a)] for a in asks]

    def _compute(self, asks: list[Ask]) -> list[ImagePrefix]:
        lengths = [self._length(a) for a in asks]
        stop, cache = max(lengths), PrefixCache()
        given = with_position_ids(decoder_arguments(self.handle, self.collate(asks)))
        mask, ids = given["attention_mask"][:, :stop], given["position_ids"]
        _, act = self._watched(lambda: run_decoder(self.handle, slice_arguments(given, 0, stop), cache))
        act = act.reshape(len(asks), stop, -1)
        axes = ids.shape[0] if ids.ndim == 3 else 1
        after = (ids[..., :stop] * mask).reshape(axes, len(asks), stop).amax((0, 2)) + 1
        pairs = [cache.added[layer] for layer in sorted(cache.added)]
        states = [[(k[i : i + 1, :, -n:].clone(), v[i : i + 1, :, -n:].clone()) for k, v in pairs] for i, n in enumerate(lengths)]
        return [ImagePrefix(own, act[i, -n:].clone(), int(after[i]), axes) for i, (own, n) in enumerate(zip(states, lengths))]

    def _run_words(self, batch: Batch, prefixes: Sequence[ImagePrefix]) -> None:
        """Run the positions behind the pictures."""
        start, cache = longest(prefixes), PrefixCache(prefixes)
        cache.frozen = True
        ids = batch.inputs["input_ids"][:, start:]
        first = torch.tensor([p.next_position for p in prefixes], device=ids.device)
        positions = first[:, None] + torch.arange(ids.shape[1], device=ids.device)
        axes = prefixes[0].axes
        given = {
            "inputs_embeds": self.handle.model.get_input_embeddings()(ids),
            "attention_mask": batch.inputs["attention_mask"],
            "position_ids": positions.expand(axes, *positions.shape) if axes > 1 else positions,
        }
        run_decoder(self.handle, given, cache)

    def _compare(self, batch: Batch) -> None:
        """Find out, once a model, whether words give the same behind a prefix as behind the picture itself.

        Nothing is concluded where the model's activations are not finite.
        """
        _, want = self._watched(lambda: self._run_all(batch))
        want = want.reshape(*batch.prompt.shape, -1)
        if not torch.isfinite(want).all():
            return
        try:
            prefixes = self.of(batch.asks)
            start = longest(prefixes)
            _, got = self._watched(lambda: self._run_words(batch, prefixes))
            real = (batch.prompt | batch.answer)[:, start:].to(got.device)
            same = agree(got.reshape(*real.shape, -1)[real], want[:, start:].to(got.device)[real])
        except torch.OutOfMemoryError:
            raise
        except (TypeError, KeyError, IndexError, AttributeError, ValueError, RuntimeError):  # a decoder of another kind
            same = False
        self.handle.cache[_FLAG] = same


def skip_image_prefixes(batch: Batch, given: dict[str, Any], cache: PrefixCache) -> tuple[dict[str, Any], int]:
    """A decoder's arguments without the positions at which every row still has its picture, and how many those are.

    The image prefixes of the cache stand first in the mask.
    """
    given = with_position_ids(given)
    mask = given["attention_mask"]
    each = torch.arange(batch.prompt.shape[1], device=mask.device)
    ends = (batch.picture.to(mask.device) * (each + 1)).amax(1)
    skipped = int(ends.min())
    lengths = torch.tensor([len(p.act) for p in cache.images], device=mask.device)
    images = torch.arange(cache.image_positions, device=mask.device) >= cache.image_positions - lengths[:, None]
    words = (mask * (each >= ends[:, None]))[:, skipped:]
    sliced = slice_arguments(given, skipped, batch.prompt.shape[1])
    return {**sliced, "attention_mask": torch.cat([images.to(mask.dtype), words], 1)}, skipped


def _byte_limit(place: torch.device) -> int:
    """Bytes for image prefixes on a device."""
    return torch.cuda.get_device_properties(place).total_memory // _GPU_SHARE if place.type == "cuda" else _CPU_BYTES
