"""How a decoder layer is built, as far as editors must know it: found out by running the model, never by its name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from testbed.core.events import Ask
from testbed.model.encoding import Batch, collate
from testbed.model.families import UnknownLayout
from testbed.model.handle import ModelHandle
from testbed.model.prefix_cache import LastLayerReached, agree

LAYOUT_PROMPT = Ask("The flag of the town is")


@torch.no_grad()
def adds_as_it_is(handle: ModelHandle, layer: int) -> bool:
    """Whether a decoder layer adds its down-projection's output to the rest of its own as it is, found out once a layer.

    A norm behind the MLP (Gemma 2, OLMo 2), the gate of a shared expert (Qwen2-MoE) or experts behind the edited matrix do more.
    Nothing is concluded where the layer's output is not finite.
    """
    layer, known = handle.layer_index(layer), handle.cache.setdefault("adds as it is", {})
    if layer in known:
        return known[layer]
    batch = collate(handle, [LAYOUT_PROMPT])
    own = _layer_output(handle, layer, batch)
    if not torch.isfinite(own).all():
        return True
    noise = torch.randn(own[:, -1].shape, generator=torch.Generator().manual_seed(0)).to(own)
    add = 4 * own.std() * noise  # far beyond rounding
    with handle.hooked(handle.down(layer), added_at(-1, add)):
        moved = _layer_output(handle, layer, batch)
    known[layer] = agree(((moved - own)[:, -1]).to(handle.dtype), add)
    return known[layer]


def _layer_output(handle: ModelHandle, layer: int, batch: Batch) -> Float[Tensor, "B T d"]:
    """(B, T, d) float32 output of a decoder layer; nothing is run behind it."""
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).float().clone())
        raise LastLayerReached

    with handle.hooked(handle.layers[layer], keep), suppress(LastLayerReached):
        handle.model(**batch.inputs, use_cache=False)
    return seen[0]


@torch.no_grad()
def verify_hidden_states(handle: ModelHandle) -> None:
    """Raise `UnknownLayout` for decoder layers that give something else than one vector of the model's width a position (Gemma 3n)."""
    batch = collate(handle, [LAYOUT_PROMPT])
    found, wanted = tuple(_layer_output(handle, 0, batch).shape), (*batch.prompt.shape, handle.width)
    if found != wanted:
        raise UnknownLayout(
            f"a decoder layer of {handle.name} ({type(handle.model).__name__}) gives {found} numbers for a prompt of {wanted[1]} tokens, "
            f"expected {wanted}, one vector a position: its hidden states can neither be read nor run on"
        )


def added_at(here: int, add: Float[Tensor, "B d"]) -> Callable[..., Tensor]:
    """A hook that adds (B, d) to a module's output at one of the positions that are run."""

    def put(module: Any, args: Any, output: Tensor) -> Tensor:
        out = output.reshape(len(add), -1, output.shape[-1]).clone()
        out[:, here] += add.to(out)
        return out.reshape(output.shape)

    return put


@torch.no_grad()
def verify_layout(handle: ModelHandle, layer: int, batch: Batch, logits: Callable[[Tensor], Tensor], kind: str) -> None:
    """Compare a partial forward with the whole model, once a layer and kind of suffix.

    Norms after the MLP, caps behind the head and the like change the logits and cannot be seen from the modules.

    The comparison is made under the model's own weight and under another one. What the other weight changes is compared
    with what it changes in the whole model, so that rounding of all that lies below does not count. Nothing is concluded
    where the model's own logits are not finite.

    Args:
        logits: the partial forward's logits (n, V) where answer tokens are predicted, under a weight of the layer's down-projection.
        kind: names the kind of suffix in the record of what was verified.

    Raises:
        UnknownLayout: the partial forward's logits are not the whole model's.
    """
    name = handle.down_weight(layer)
    if layout_verified(handle, layer, kind):
        return
    weight = handle.parameter(name).detach()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    other = (weight + 4 * weight.float().std() * noise.to(weight.device)).to(weight.dtype)  # far beyond rounding
    base = handle.model(**batch.inputs, use_cache=False).logits[batch.before_answer].float()
    with handle.swapped({name: other}):
        change = handle.model(**batch.inputs, use_cache=False).logits[batch.before_answer].float() - base
    if not torch.isfinite(base).all():
        return
    try:
        own, moved = logits(weight).float(), logits(other).float()
        share, apart = _relative(moved - own - change, change), _relative(own - base, base)
    except RuntimeError:  # a projection between the last layer and the head: the widths do not fit
        share = apart = float("inf")
    limits = (0.01, 1e-3) if weight.dtype in (torch.float32, torch.float64) else (0.3, 0.1)
    if not (share <= limits[0] and apart <= limits[1]):
        raise UnknownLayout(
            f"layer {layer} of {type(handle.model).__name__} cannot be run on from its own activations: the logits are off by "
            f"{apart:.0%}, and under a changed weight by {share:.0%} of the change. Use a model whose layers follow one another and whose "
            "logits are those of its last norm and head (docs/models.md)"
        )
    handle.cache.setdefault("verified layouts", set()).add((kind, name))


def layout_verified(handle: ModelHandle, layer: int, kind: str = "down-projection") -> bool:
    """Whether `verify_layout` has passed for this layer and kind of suffix."""
    return (kind, handle.down_weight(layer)) in handle.cache.get("verified layouts", ())


def _relative(off: Tensor, of: Tensor) -> float:
    return float(off.norm() / of.norm().clamp(min=1e-12))
