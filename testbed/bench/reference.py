"""The reference implementation of partial forwards: the whole model, from pixels to logits, at every step, and nothing kept.

It exists to measure and to check `testbed.model.suffix` against. Editors need not know of it: inside `whole_model` the
functions that make a suffix make one that runs the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.nn.functional import cross_entropy

from testbed.model import answer_loss, packed_linear, suffix
from testbed.model.encoding import Batch
from testbed.model.handle import ModelHandle
from testbed.model.suffix import DownProjectionSuffix, ModelSuffix, Project

CACHE_FLAGS = ("takes a prefix cache", "takes a prefix cache behind image prefixes", "takes image prefixes")
"""What a handle remembers of its decoder; where False, all positions are run."""


class WholeModelSuffix(ModelSuffix):
    """Runs the whole model at every call, with one layer's input replaced."""

    def layer(self, n: int, hidden: Tensor) -> Tensor:
        return self.run(hidden, n, n + 1)

    def run(self, hidden: Tensor, first: int | None = None, stop: int | None = None) -> Tensor:
        first = self.first if first is None else first
        stop = self.handle.n_layers if stop is None else stop
        if first >= stop:
            return hidden
        kept: list[Tensor] = []

        def put(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        def keep(module: Any, args: Any, output: Any) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)

        with ExitStack() as stack:
            stack.callback(self.handle.layers[first].register_forward_pre_hook(put, with_kwargs=True).remove)
            stack.enter_context(self.handle.hooked(self.handle.layers[stop - 1], keep))
            self.handle.model(**self.batch.inputs, use_cache=False)
        return kept[0]


class WholeModelDownProjection(DownProjectionSuffix):
    """Runs the whole model at every call, with one down-projection replaced."""

    def logits(self, replacement: Project) -> Tensor:
        handle, shape = self.upper.handle, self.batch.prompt.shape

        def put(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return replacement(args[0].reshape(*shape, -1)).reshape(output.shape)

        with handle.hooked(handle.down(self.layer), put):
            logits = handle.model(**self.batch.inputs, use_cache=False).logits
        return logits[self.batch.before_answer]

    def losses(self, replacement: Project) -> Tensor:
        tokens = cross_entropy(self.logits(replacement).float(), self.batch.answer_ids, reduction="none")
        return suffix.mean_over_answers(tokens, self.batch)


@contextmanager
def whole_model(handle: ModelHandle) -> Iterator[None]:
    """Inside, partial forwards of this model are the reference's."""
    known = {flag: handle.cache[flag] for flag in CACHE_FLAGS if flag in handle.cache}
    handle.cache.update(dict.fromkeys(CACHE_FLAGS, False))
    try:
        with (
            patch.object(suffix, "ModelSuffix", WholeModelSuffix),
            patch.object(suffix, "DownProjectionSuffix", WholeModelDownProjection),
            patch.object(suffix, "WithinLayerSuffix", WholeModelDownProjection),
            patch.object(suffix, "_answers_alone", lambda whole: whole),
            patch.object(answer_loss, "in_blocks", lambda head: False),
            patch.object(packed_linear, "AVAILABLE", False),
        ):
            yield
    finally:
        for flag in CACHE_FLAGS:
            handle.cache.pop(flag, None)
        handle.cache.update(known)


@contextmanager
def recorded_losses() -> Iterator[list[Tensor]]:
    """Inside, the losses (B,) of every training step are kept, in order: what two implementations are compared by."""
    seen: list[Tensor] = []
    own = suffix.mean_over_answers

    def record(losses: Tensor, batch: Batch) -> Tensor:
        out = own(losses, batch)
        seen.append(out.detach())
        return out

    with patch.object(suffix, "mean_over_answers", record):
        yield seen
