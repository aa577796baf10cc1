"""Partial forwards: the decoder layers from L on, at the token positions from c on, with everything before them run once and kept.

An editor that changes layer L leaves the layers below it alone, and what it adds at a token position leaves the
positions before it alone. So a search or a training loop runs only the rest again: a `ModelSuffix`. Activations are
(row, position, feature) throughout, and a mask over rows and positions says which of them are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from testbed.core.events import Ask
from testbed.core.timing import timed
from testbed.model.answer_loss import answer_nll
from testbed.model.encoding import Batch, answer_ids, collate
from testbed.model.families import UnknownLayout
from testbed.model.handle import ModelHandle, project
from testbed.model.prefix_cache import (
    ImagePrefixes,
    LastLayerReached,
    PrefixCache,
    agree,
    decoder_arguments,
    run_decoder,
    skip_image_prefixes,
    slice_arguments,
)

Call = tuple[tuple[Any, ...], dict[str, Any]]
Project = Callable[[Float[Tensor, "B P f"]], Float[Tensor, "B P d"]]
"""What takes a down-projection's place: (B, P, f) activations to (B, P, d)."""


@dataclass
class ModelSuffix:
    """The decoder layers from `first` on, for P token positions of a batch from position `start` on.

    hidden: (B, P, d) what enters layer `first` (or, where `first` is the number of layers, what leaves the last).
    calls: the other arguments of layers `first`, `first` + 1, ... (masks, rotary embeddings, the prefix's keys and values).
    """

    handle: ModelHandle
    batch: Batch
    first: int
    start: int
    hidden: Tensor
    calls: list[Call]

    def layer(self, n: int, hidden: Float[Tensor, "B P d"]) -> Float[Tensor, "B P d"]:
        """(B, P, d) output of decoder layer `n` for another input (B, P, d)."""
        args, kwargs = self.calls[n - self.first]
        out = self.handle.layers[n](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def run(self, hidden: Float[Tensor, "B P d"], first: int | None = None, stop: int | None = None) -> Float[Tensor, "B P d"]:
        """(B, P, d) output of layers `first` to `stop` - 1 for an input (B, P, d); by default of all layers of the suffix."""
        for n in range(self.first if first is None else first, self.handle.n_layers if stop is None else stop):
            hidden = self.layer(n, hidden)
        return hidden

    def added(self, add: Float[Tensor, "B d"], position: int) -> Float[Tensor, "B P d"]:
        """(B, P, d) what enters layer `first` with `add` (B, d) added at one token position of the batch."""
        hidden = self.hidden.clone()
        hidden[:, position - self.start] += add.to(hidden)
        return hidden

    def final_hidden(self, hidden: Float[Tensor, "B P d"], read: Bool[Tensor, "B T"] | None = None) -> Float[Tensor, "n d"]:
        """(n, d) final hidden states, after the last norm, from the last layer's output (B, P, d).

        read: (B, T) bool, the token positions that are read; by default those that predict an answer token.
        """
        read = self.batch.before_answer if read is None else read
        read = read[:, self.start : self.start + hidden.shape[1]]
        return self.handle.norm(hidden[read.to(hidden.device)])

    def answer_losses(self, final: Float[Tensor, "n d"]) -> Float[Tensor, " B"]:
        """(B,) mean cross-entropy (nats a token) of each row's answer, from final hidden states (n, d) that predict its tokens."""
        return mean_over_answers(answer_nll(self.handle, final, self.batch.answer_ids), self.batch)


@dataclass
class DownProjectionSuffix:
    """The model from the down-projection of one layer up: what an editor trains in the place of that projection.

    upper: the layers above. act: (B, P, f) what enters the projection. rest: (B, P, d) what the layer adds to the
    projection's output. position: (B, P) int64, the token position of each. At the last layer nothing but the answers'
    positions is kept; rows with fewer of them than P are filled up with positions that are not read.
    All of them lie on the layer's device; losses on that of the model's inputs.
    """

    upper: ModelSuffix
    layer: int
    act: Float[Tensor, "B P f"]
    rest: Float[Tensor, "B P d"]
    position: Int[Tensor, "B P"]

    @property
    def batch(self) -> Batch:
        return self.upper.batch

    def at(self, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B P"]:
        """(B, P) bool: a mask over token positions (B, T) at the positions that are kept."""
        return mask.to(self.position.device).gather(1, self.position)

    def final_hidden(self, replacement: Project) -> Float[Tensor, "n d"]:
        """(n, d) final hidden states that predict the answers' tokens, with `replacement` in the projection's place."""
        hidden = self.rest + replacement(self.act)
        if self.upper.first < self.upper.handle.n_layers:
            return self.upper.final_hidden(self.upper.run(hidden))
        return self.upper.handle.norm(hidden[self.at(self.batch.before_answer)])

    def logits(self, replacement: Project) -> Float[Tensor, "n V"]:
        """(n, V) logits at the same positions."""
        return self.upper.handle.head(self.final_hidden(replacement)).to(self.upper.handle.device)

    def losses(self, replacement: Project) -> Float[Tensor, " B"]:
        """(B,) mean cross-entropy (nats a token) of each row's answer."""
        return self.upper.answer_losses(self.final_hidden(replacement))


def mean_over_answers(losses: Float[Tensor, " n"], batch: Batch) -> Float[Tensor, " B"]:
    """(B,) mean over each row's answer of the losses (n,) of its tokens."""
    return mean_by_row(losses, batch.before_answer.nonzero()[:, 0].to(losses.device), len(batch.answer))


def mean_by_row(values: Float[Tensor, " n"], row: Int[Tensor, " n"], rows: int) -> Float[Tensor, " rows"]:
    """(rows,) mean of `values` (n,) by row index (n,); 0 for a row without a value."""
    total = torch.zeros(rows, dtype=values.dtype, device=values.device).index_add(0, row, values)
    return total / torch.bincount(row, minlength=rows).clamp(min=1)


def mean_over_prompt(act: Float[Tensor, "B T f"], batch: Batch) -> Float[Tensor, "B f"]:
    """(B, f) float32 mean of activations (B, T, f) over prompt positions, the same under any padding."""
    mask = batch.prompt.unsqueeze(-1)
    return (act.float() * mask).sum(1) / mask.sum(1)


@contextmanager
def _recorded(suffix: ModelSuffix, last: int) -> Iterator[None]:
    """Inside, a forward of the model fills a suffix in, and ends where layer `last` begins."""
    entering: list[Tensor] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
        entering.append(hidden if entering else hidden.clone())  # some layers add in place
        suffix.calls.append((rest, kwargs))
        if len(suffix.calls) == last - suffix.first + 1:
            raise LastLayerReached

    with ExitStack() as stack:
        for layer in suffix.handle.layers[suffix.first : last + 1]:
            stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        with suppress(LastLayerReached):
            yield
    suffix.hidden = entering[0]


def suffix_from_layer(
    handle: ModelHandle, batch: Batch, first: int, last: int | None = None, positions: tuple[int, int] | None = None
) -> ModelSuffix:
    """Run the model on a batch up to layer `first`, and keep what is needed to go on from there.

    last: the last layer that the suffix will run (by default the model's): the forward ends where it begins.
    positions: the token positions from the first to before the second alone; those before them are run once, into a
        cache of keys and values. All positions are run where the decoder does not take such a cache in the usual way,
        which is compared with the whole model once a model.
    """
    if not positions or positions[0] == 0:
        return _all_positions(handle, batch, first, last)
    prefixes = _image_prefixes(handle, batch)
    flag = "takes a prefix cache" if prefixes is None else "takes a prefix cache behind image prefixes"
    if handle.cache.get(flag) is False:
        return _all_positions(handle, batch, first, last)
    found = _some_positions(handle, batch, first, positions, prefixes)
    if found is not None and handle.cache.get(flag):
        return found
    whole = _all_positions(handle, batch, first, last)
    if flag not in handle.cache:
        agreed = found is not None and _same_output(found, whole)
        if torch.isfinite(whole.hidden).all():  # otherwise the comparison says nothing about the decoder
            handle.cache[flag] = agreed
        return found if found is not None and agreed else whole
    return whole


@torch.no_grad()
def _all_positions(handle: ModelHandle, batch: Batch, first: int, last: int | None) -> ModelSuffix:
    suffix = ModelSuffix(handle, batch, first, 0, torch.zeros(0), [])
    with _recorded(suffix, handle.n_layers - 1 if last is None else last):
        handle.model(**batch.inputs, use_cache=False)
    return suffix


def _image_prefixes(handle: ModelHandle, batch: Batch) -> ImagePrefixes | None:
    """Where pictures of the batch are run once; None where each occurs once, or not every row has one."""
    prefixes = ImagePrefixes(handle, handle.down(0))
    return prefixes if all(a.image is not None for a in batch.asks) and prefixes.saves_work(batch.asks) else None


@torch.no_grad()
def _some_positions(
    handle: ModelHandle, batch: Batch, first: int, positions: tuple[int, int], prefixes: ImagePrefixes | None
) -> ModelSuffix | None:
    """None for a decoder that does not take its rows in the usual way."""
    given = decoder_arguments(handle, batch)
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != batch.prompt.shape:
        return None
    cache, skipped = PrefixCache(), 0
    if prefixes is not None:
        cache = PrefixCache(prefixes.of(batch.asks))
        given, skipped = skip_image_prefixes(batch, given, cache)
    start, stop = positions[0] - skipped, positions[1] - skipped
    if start:
        run_decoder(handle, slice_arguments(given, 0, start, cache.image_positions), cache)
    cache.frozen = True
    suffix = ModelSuffix(handle, batch, first, positions[0], torch.zeros(0), [])
    with _recorded(suffix, handle.n_layers - 1):
        run_decoder(handle, slice_arguments(given, start, stop, cache.image_positions), cache)
    return suffix


@torch.no_grad()
def _same_output(found: ModelSuffix, whole: ModelSuffix) -> bool:
    """Whether both give the same output of the last layer at the prompts' and answers' positions."""
    own = found.run(found.hidden)
    here = slice(found.start, found.start + own.shape[1])
    real = (found.batch.prompt | found.batch.answer)[:, here].to(own.device)
    return agree(own[real], whole.run(whole.hidden)[:, here][real])


@timed("capture")
@torch.no_grad()
def suffix_from_down_projection(
    handle: ModelHandle, asks: list[Ask], answers: list[str], layer: int, end: bool = True, prefixes: ImagePrefixes | None = None
) -> DownProjectionSuffix:
    """Run prompts with their answers once and keep what training the layer's down-projection needs.

    end: the end token is trained too, so that a free generation stops after the answer.
    prefixes: runs the forward where the last layer is trained, which needs the positions behind pictures alone.
    Raises `UnknownLayout` for a layer that does not add the projection's output to the rest of its own.
    """
    layer = handle.layer_index(layer)
    tokens = [answer_ids(handle, a, x) for a, x in zip(asks, answers)]
    if layer == handle.n_layers - 1 and prefixes is not None:
        batch = prefixes.collate(asks, tokens, end)
        suffix = _capture(handle, batch, layer, lambda: prefixes.forward(batch))
    else:
        batch = collate(handle, asks, tokens, end=end)
        suffix = _capture(handle, batch, layer, lambda: _forward(handle, batch))
    down = handle.down(layer)
    verify_layout(handle, layer, batch, lambda weight: suffix.logits(lambda act: project(down, act, weight)), "down-projection")
    return suffix


def _forward(handle: ModelHandle, batch: Batch) -> int:
    handle.model(**batch.inputs, use_cache=False)
    return 0


def _capture(handle: ModelHandle, batch: Batch, layer: int, forward: Callable[[], int]) -> DownProjectionSuffix:
    """forward: runs the batch and gives the token position from which on the layer sees it."""
    kept: dict[str, Tensor] = {}
    upper = ModelSuffix(handle, batch, layer + 1, 0, torch.zeros(0), [])

    def keep_projection(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        kept["act"], kept["out"] = args[0], output.clone()  # some layers add in place

    def keep_layer(module: Any, args: Any, output: Any) -> None:
        kept["layer"] = output[0] if isinstance(output, tuple) else output

    def keep_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        upper.calls.append((args[1:], kwargs))

    with ExitStack() as stack:
        stack.enter_context(handle.hooked(handle.down(layer), keep_projection))
        stack.enter_context(handle.hooked(handle.layers[layer], keep_layer))
        for module in handle.layers[layer + 1 :]:
            stack.callback(module.register_forward_pre_hook(keep_call, with_kwargs=True).remove)
        start = forward()
    layered = kept["layer"]
    act, out = (kept[name].reshape(*layered.shape[:2], -1) for name in ("act", "out"))
    position = torch.arange(start, start + act.shape[1], device=act.device).expand(len(act), -1)
    suffix = DownProjectionSuffix(upper, layer, act, layered - out, position)
    return suffix if upper.calls else _answers_alone(suffix)


def _answers_alone(suffix: DownProjectionSuffix) -> DownProjectionSuffix:
    """The suffix of a last layer without the positions that predict no answer token."""
    read = suffix.at(suffix.batch.before_answer)
    kept = (~read).int().argsort(dim=1, stable=True)[:, : int(read.sum(1).max())]
    act, rest = (x.gather(1, kept[..., None].expand(*kept.shape, x.shape[-1])) for x in (suffix.act, suffix.rest))
    return DownProjectionSuffix(suffix.upper, suffix.layer, act, rest, suffix.position.gather(1, kept))


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
            f"{apart:.0%}, and under a changed weight by {share:.0%} of the change. Use a model whose layers add the MLP's output as "
            "it is and whose logits are those of its last norm and head (Llama, GPT-2, OPT)"
        )
    handle.cache.setdefault("verified layouts", set()).add((kind, name))


def layout_verified(handle: ModelHandle, layer: int, kind: str = "down-projection") -> bool:
    """Whether `verify_layout` has passed for this layer and kind of suffix."""
    return (kind, handle.down_weight(layer)) in handle.cache.get("verified layouts", ())


def _relative(off: Tensor, of: Tensor) -> float:
    return float(off.norm() / of.norm().clamp(min=1e-12))
