"""Partial forwards: the decoder layers from L on, at the token positions from c on, with everything before them run once and kept.

An editor that changes layer L leaves the layers below it alone, and what it adds at a token position leaves the
positions before it alone. So a search or a training loop runs only the rest again: a `ModelSuffix`. Activations are
(row, position, feature) throughout, and a mask over rows and positions says which of them are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from testbed.core.events import Ask
from testbed.core.timing import timed
from testbed.model.answer_loss import answer_nll
from testbed.model.encoding import Batch, answer_ids, collate
from testbed.model.handle import ModelHandle, project
from testbed.model.layout import added_at, adds_as_it_is, verify_layout
from testbed.model.prefix_cache import (
    ImagePrefixes,
    LastLayerReached,
    PrefixCache,
    agree,
    decoder_arguments,
    run_decoder,
    skip_image_prefixes,
    slice_arguments,
    takes_slices,
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
    between: dict[int, Tensor] = field(default_factory=dict)
    """By layer, what the model adds to its output before the next layer (Qwen3-VL: features of the picture), (B, P, d)."""

    def layer(self, n: int, hidden: Float[Tensor, "B P d"]) -> Float[Tensor, "B P d"]:
        """(B, P, d) output of decoder layer `n` for another input (B, P, d)."""
        args, kwargs = self.calls[n - self.first]
        out = self.handle.layers[n](hidden, *args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        return out + self.between[n] if n in self.between else out

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

    def run_with_added(self, layer: int, add: Float[Tensor, "B d"], position: int) -> Float[Tensor, "B P d"]:
        """(B, P, d) the last layer's output with `add` (B, d) added to what `layer`'s down-projection gives at one token position.

        The suffix begins behind that layer, or with it where the layer has to be run (`suffix_behind`).
        """
        if self.first > layer:
            return self.run(self.added(add, position))
        with self.handle.hooked(self.handle.down(layer), added_at(position - self.start, add)):
            hidden = self.layer(layer, self.hidden)
        return self.run(hidden, layer + 1)

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

    def layer_output(self, replacement: Project) -> Float[Tensor, "B P d"]:
        """(B, P, d) the layer's output, with `replacement` in the projection's place."""
        return self.rest + replacement(self.act)

    def at(self, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B P"]:
        """(B, P) bool: a mask over token positions (B, T) at the positions that are kept."""
        return mask.to(self.position.device).gather(1, self.position)

    def final_hidden(self, replacement: Project) -> Float[Tensor, "n d"]:
        """(n, d) final hidden states that predict the answers' tokens, with `replacement` in the projection's place."""
        hidden = self.layer_output(replacement)
        if self.layer + 1 < self.upper.handle.n_layers:
            return self.upper.final_hidden(self.upper.run(hidden, self.layer + 1))
        return self.upper.handle.norm(hidden[self.at(self.batch.before_answer)])

    def logits(self, replacement: Project) -> Float[Tensor, "n V"]:
        """(n, V) logits at the same positions."""
        return self.upper.handle.logits(self.final_hidden(replacement))

    def losses(self, replacement: Project) -> Float[Tensor, " B"]:
        """(B,) mean cross-entropy (nats a token) of each row's answer."""
        return self.upper.answer_losses(self.final_hidden(replacement))


@dataclass
class WithinLayerSuffix(DownProjectionSuffix):
    """The same for a layer that does more to the projection's output than add it: a norm, a gate or experts lie behind it.

    rest: (B, P, d) what enters the layer, which is run at every step.
    """

    def layer_output(self, replacement: Project) -> Float[Tensor, "B P d"]:
        """(B, P, d) the layer's output, with `replacement` in the projection's place."""
        new = replacement(self.act)
        with self.upper.handle.hooked(self.upper.handle.down(self.layer), lambda m, args, out: new.reshape(out.shape)):
            return self.upper.layer(self.layer, self.rest)


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
def _additions(handle: ModelHandle, first: int, between: dict[int, Tensor]) -> Iterator[None]:
    """Inside, a forward fills in what the model adds to the output of layers from `first` on before the next one."""
    left: list[Tensor] = []

    def leave(module: Any, args: Any, output: Any) -> None:
        left[:] = [output[0] if isinstance(output, tuple) else output]

    def enter(n: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if n == first:
            left.clear()  # another forward begins
        if left and hidden is not left[0] and hidden.device == left[0].device:
            between[n - 1] = hidden - left[0]

    with ExitStack() as stack:
        for n, layer in enumerate(handle.layers[first:], first):
            stack.callback(layer.register_forward_pre_hook(lambda m, args, kwargs, n=n: enter(n, args, kwargs), with_kwargs=True).remove)
            stack.enter_context(handle.hooked(layer, leave))
        yield


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
        stack.enter_context(_additions(suffix.handle, suffix.first, suffix.between))
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


def suffix_behind(handle: ModelHandle, batch: Batch, layer: int, positions: tuple[int, int] | None = None) -> ModelSuffix:
    """The suffix for changes of a layer's down-projection: from the next layer on, or from this one where it has to be run."""
    return suffix_from_layer(handle, batch, layer + adds_as_it_is(handle, layer), positions=positions)


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
    if not takes_slices(given, batch.prompt.shape[1]):
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
    if not adds_as_it_is(handle, layer):
        batch = collate(handle, asks, tokens, end=end)
        suffix = _within_layer(handle, batch, layer)
    elif layer == handle.n_layers - 1 and prefixes is not None:
        batch = prefixes.collate(asks, tokens, end)
        suffix = _capture(handle, batch, layer, lambda: prefixes.forward(batch))
    else:
        batch = collate(handle, asks, tokens, end=end)
        suffix = _capture(handle, batch, layer, lambda: _forward(handle, batch))
    down = handle.down(layer)
    verify_layout(handle, layer, batch, lambda weight: suffix.logits(lambda act: project(down, act, weight)), "down-projection")
    return suffix


def _within_layer(handle: ModelHandle, batch: Batch, layer: int) -> WithinLayerSuffix:
    upper, kept = suffix_from_layer(handle, batch, layer), list[Tensor]()
    with handle.hooked(handle.down(layer), lambda m, args: kept.append(args[0]), pre=True):
        upper.layer(layer, upper.hidden)
    act = kept[0].reshape(*batch.prompt.shape, -1)
    position = torch.arange(act.shape[1], device=act.device).expand(len(act), -1)
    return WithinLayerSuffix(upper, layer, act, upper.hidden, position)


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
        stack.enter_context(_additions(handle, layer, upper.between))
        for module in handle.layers[layer + 1 :]:
            stack.callback(module.register_forward_pre_hook(keep_call, with_kwargs=True).remove)
        start = forward()
    layered = kept["layer"]
    act, out = (kept[name].reshape(*layered.shape[:2], -1) for name in ("act", "out"))
    position = torch.arange(start, start + act.shape[1], device=act.device).expand(len(act), -1)
    rest = layered - out
    if layer in upper.between:
        rest = rest + upper.between.pop(layer)
    suffix = DownProjectionSuffix(upper, layer, act, rest, position)
    return suffix if upper.calls else _answers_alone(suffix)


def _answers_alone(suffix: DownProjectionSuffix) -> DownProjectionSuffix:
    """The suffix of a last layer without the positions that predict no answer token."""
    read = suffix.at(suffix.batch.before_answer)
    kept = (~read).int().argsort(dim=1, stable=True)[:, : int(read.sum(1).max())]
    act, rest = (x.gather(1, kept[..., None].expand(*kept.shape, x.shape[-1])) for x in (suffix.act, suffix.rest))
    return DownProjectionSuffix(suffix.upper, suffix.layer, act, rest, suffix.position.gather(1, kept))
