"""The part of a model from one down-projection up, with everything below run once and kept.

Every editor here changes a down-projection W (d, f) of one decoder layer. Nothing below it depends on W, so
training W, a copy of it or a low-rank addition re-runs only what lies above. At the last layer that is the
final norm and the head, at the few positions that predict the answer.

Inside `plain_path.plain()` the same objects re-run the whole model at every call and keep nothing: the plain path, to
measure and to check the fast one against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from testbed.core.events import Ask
from testbed.core.timing import stage
from testbed.model.answer_loss import answer_nll
from testbed.model.encoding import Batch, answer_ids, collate
from testbed.model.families import UnknownLayout
from testbed.model.handle import ModelHandle, project
from testbed.model.reference_mode import inside_plain, watch


@dataclass
class Tail:
    """Kept activations of one batch of edits (B rows, n answer positions in all).

    act: activations entering the down-projection; (B, T, f), or (n, f) at the last layer.
    rest: what the layer adds to the projection's output; same leading shape, width d.
    row: (n,) the batch row of each answer position. target: (n,) its token.

    All but `batch` and `target` lie beside the layer; logits and losses beside the model's inputs.
    """

    handle: ModelHandle
    batch: Batch
    layer: int
    act: Tensor
    rest: Tensor
    row: Tensor
    target: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    def ends(self, project: Callable[[Tensor], Tensor]) -> Tensor:
        """(n, d) what enters the head at the answer positions when `project` takes the down-projection's place."""
        hidden = self.rest + project(self.act)
        if self.calls:
            for module, (args, kwargs) in zip(self.handle.layers[self.layer + 1 :], self.calls):
                out = module(hidden, *args, **kwargs)
                hidden = out[0] if isinstance(out, tuple) else out
            hidden = hidden[self.batch.before_answer.to(hidden.device)]
        return self.handle.norm(hidden)

    def logits(self, project: Callable[[Tensor], Tensor]) -> Tensor:
        """(n, V) logits at the same."""
        return self.handle.head(self.ends(project)).to(self.handle.device)

    def loss(self, project: Callable[[Tensor], Tensor]) -> Tensor:
        """(B,) mean next-token cross-entropy (nats a token) of each row's answer."""
        nll = self._nll(project)
        return watch(row_mean(nll, self.row.to(nll.device), self.batch.answer.shape[0]))

    def _nll(self, project: Callable[[Tensor], Tensor]) -> Tensor:
        return answer_nll(self.handle, self.ends(project), self.target)


class WholeTail(Tail):
    """The same through the whole model; `act` and `rest` hold all positions at every layer."""

    def logits(self, project: Callable[[Tensor], Tensor]) -> Tensor:
        shape = self.batch.prompt.shape

        def put(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return project(args[0].reshape(*shape, -1)).reshape(output.shape)

        with self.handle.hooked(self.handle.down(self.layer), put):
            logits = self.handle.model(**self.batch.inputs, use_cache=False).logits
        return logits[self.batch.before_answer]

    def _nll(self, project: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.nn.functional.cross_entropy(self.logits(project).float(), self.target, reduction="none")


def row_mean(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Mean of `values` (n,) by row index (n,), as (rows,)."""
    total = torch.zeros(rows, dtype=values.dtype, device=values.device).index_add(0, row, values)
    return total / torch.bincount(row, minlength=rows).clamp(min=1)


class Runs(Protocol):
    """How a batch is made and the unedited model run on it."""

    def collate(self, asks: Sequence[Ask], answers: Sequence[Sequence[int]] | None = None, end: bool = False) -> Batch: ...

    def forward(self, batch: Batch) -> int:
        """Modules see, last, the columns from the one that is returned on."""
        ...


@dataclass(frozen=True)
class Whole:
    """All columns at once."""

    handle: ModelHandle

    def collate(self, asks: Sequence[Ask], answers: Sequence[Sequence[int]] | None = None, end: bool = False) -> Batch:
        return collate(self.handle, asks, answers, end=end)

    def forward(self, batch: Batch) -> int:
        self.handle.model(**batch.inputs, use_cache=False)
        return 0


@stage("capture")
@torch.no_grad()
def capture(handle: ModelHandle, asks: list[Ask], answers: list[str], layer: int, end: bool = True, stems: Runs | None = None) -> Tail:
    """Run the batch once and keep what training the layer's down-projection needs.

    With `end` the end token is trained too, so that a free generation stops after the answer. stems: runs the forward
    where the last layer is trained, which needs the columns behind pictures alone. Raises `UnknownLayout` for a layer
    that does not add the projection's output to the rest of its own.
    """
    layer = handle.layer_index(layer)
    runs = stems if stems is not None and layer == handle.n_layers - 1 else Whole(handle)
    batch = runs.collate(asks, [answer_ids(handle, a, x) for a, x in zip(asks, answers)], end)
    kept: dict[str, Tensor] = {}
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def keep_act(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        kept["act"], kept["out"] = args[0], output.clone()  # some layers add in place

    def keep_layer(module: Any, args: Any, output: Any) -> None:
        kept["layer"] = output[0] if isinstance(output, tuple) else output

    def keep_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args[1:], kwargs))

    with ExitStack() as stack:
        stack.enter_context(handle.hooked(handle.down(layer), keep_act))
        stack.enter_context(handle.hooked(handle.layers[layer], keep_layer))
        for above in handle.layers[layer + 1 :]:
            stack.callback(above.register_forward_pre_hook(keep_call, with_kwargs=True).remove)
        start = runs.forward(batch)
    layered = kept["layer"]
    act, out = (kept[name].reshape(*layered.shape[:2], -1) for name in ("act", "out"))
    rest = layered - out
    at = batch.on(act.device).before_answer
    if inside_plain():
        return WholeTail(handle, batch, layer, act, rest, at.nonzero()[:, 0], batch.answer_ids, [])
    if not calls:
        act, rest = act[at[:, start:]], rest[at[:, start:]]
    tail = Tail(handle, batch, layer, act, rest, at.nonzero()[:, 0], batch.answer_ids, calls)
    checked: set[int] = handle.cache.setdefault("tails", set())
    if layer not in checked and _check(tail):
        checked.add(layer)
    return tail


def _check(tail: Tail) -> bool:
    """Compare with the whole model under its own weight and another, once a layer: norms after the MLP and the like cannot be seen
    otherwise. What the other weight changes is compared with what it changes there, so that rounding of all that lies below does not count.

    False where the model's own logits are not finite, so that there is nothing to compare with.
    """
    handle, name = tail.handle, tail.handle.down_weight(tail.layer)
    down, weight = handle.down(tail.layer), handle.parameter(name).detach()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    other = (weight + 4 * weight.float().std() * noise.to(weight.device)).to(weight.dtype)  # far beyond rounding
    at = tail.batch.before_answer
    base = handle.model(**tail.batch.inputs, use_cache=False).logits[at].float()
    with handle.swapped({name: other}):
        change = handle.model(**tail.batch.inputs, use_cache=False).logits[at].float() - base
    if not torch.isfinite(base).all():
        return False
    try:
        own, moved = (tail.logits(lambda act, w=w: project(down, act, w)).float() for w in (weight, other))
        share, apart = (float(off.norm() / of.norm().clamp(min=1e-12)) for off, of in ((moved - own - change, change), (own - base, base)))
    except RuntimeError:  # a projection between the last layer and the head: the widths do not fit
        share = apart = float("inf")
    most = (0.01, 1e-3) if weight.dtype in (torch.float32, torch.float64) else (0.3, 0.1)
    if not (share <= most[0] and apart <= most[1]):
        raise UnknownLayout(
            f"layer {tail.layer} of {type(handle.model).__name__} cannot be trained from its down-projection up: its logits are off by "
            f"{apart:.0%}, and under a changed weight by {share:.0%} of the change. Use one whose layers add the MLP's output as it is "
            "(Llama, GPT-2, OPT)"
        )
    return True


class Enough(Exception):
    """Ends a forward whose remaining layers are not needed."""


@dataclass
class Above:
    """Decoder layers from `first` on, with everything below them run once.

    hidden: (B, T, d) what enters layer `first`. calls: the other arguments of layers `first`, `first` + 1, ...
    """

    handle: ModelHandle
    first: int
    hidden: Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]

    @contextmanager
    def entered(self, last: int) -> Iterator[None]:
        """Inside, a forward of the model fills this in, and ends where layer `last` begins."""
        seen: list[Tensor] = []

        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            entering, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
            seen.append(entering.clone() if not seen else entering)
            self.calls.append((rest, kwargs))
            if len(self.calls) == last - self.first + 1:
                raise Enough

        with ExitStack() as stack:
            for layer in self.handle.layers[self.first : last + 1]:
                stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
            with suppress(Enough):
                yield
        self.hidden = seen[0]

    def layer(self, n: int, hidden: Tensor) -> Tensor:
        """(B, T, d) output of layer `n` for another input."""
        args, kwargs = self.calls[n - self.first]
        out = self.handle.layers[n](hidden, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def through(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """(B, T, d) output of layers `start` to `stop` - 1."""
        for n in range(start, stop):
            hidden = self.layer(n, hidden)
        return hidden

    def ends(self, hidden: Tensor, at: Tensor) -> Tensor:
        """(n, d) what enters the head at the positions `at` (B, T) bool, from the output of the last layer."""
        return self.handle.norm(hidden[at.to(hidden.device)])


@dataclass
class WholeAbove(Above):
    """The same through the whole model, of which one layer's input is replaced."""

    batch: Batch

    def layer(self, n: int, hidden: Tensor) -> Tensor:
        return self.through(hidden, n, n + 1)

    def through(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        if start >= stop:
            return hidden
        kept: list[Tensor] = []

        def put(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        def keep(module: Any, args: Any, output: Any) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as stack:
            stack.callback(self.handle.layers[start].register_forward_pre_hook(put, with_kwargs=True).remove)
            stack.enter_context(self.handle.hooked(self.handle.layers[stop - 1], keep))
            self.handle.model(**self.batch.inputs, use_cache=False)
        return kept[0]


@torch.no_grad()
def enter(handle: ModelHandle, batch: Batch, first: int, last: int) -> Above:
    """Run the model up to layer `first` and note how it calls layers `first` to `last`; those above `last` are not run."""
    above = WholeAbove(handle, first, torch.zeros(0), [], batch) if inside_plain() else Above(handle, first, torch.zeros(0), [])
    with above.entered(last):
        handle.model(**batch.inputs, use_cache=False)
    return above


def pooled(act: Tensor, batch: Batch) -> Tensor:
    """(B, f) float32 mean over prompt positions of activations (B, T, f), the same under any padding."""
    mask = batch.prompt.unsqueeze(-1)
    return (act.float() * mask).sum(1) / mask.sum(1)
