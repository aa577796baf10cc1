"""K-FAC factors of down-projections, and the directions of a weight along which running text hardly notices a change.

Of a linear map with input a and gradient g at its output, the Gauss-Newton matrix of a loss is near the Kronecker product of

    A = E[a a^T] (f, f) ,        B = E[g g^T] (d, d)                                                  (1)

(Martens and Grosse 2015), with means over the positions that predict a token of text. A change D of the weight (d, f) costs
sum_ij lambda^B_i lambda^A_j (U_B^T D U_A)_ij^2 in the eigenbases. The fewest entries ij with the largest products that hold a
share gamma of their sum are held fixed (M = 0, elsewhere 1), and what may change of D is

    P(D) = U_B ((U_B^T D U_A) * M) U_A^T .                                                            (2)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from testbed.editors.base import BadEditor
from testbed.editors.locate.general_text import Corpus
from testbed.editors.locate.second_moments import corpus_batches
from testbed.model.answer_loss import answer_nll
from testbed.model.encoding import Batch
from testbed.model.handle import ModelHandle
from testbed.model.suffix import suffix_from_layer
from testbed.storage.files import replacing

_ROWS, _TOKENS = 8, 2_048
"""Questions of one backward, and padded tokens of one of running text."""


@dataclass(frozen=True)
class Factors:
    """Equation 1 over n positions: a (f, f) and b (d, d), float64."""

    a: Float[Tensor, "f f"]
    b: Float[Tensor, "d d"]
    n: int


def merged(parts: Sequence[Factors]) -> Factors:
    """The factors over all positions of the parts: their means, weighted by the numbers of positions."""
    total = sum(p.n for p in parts)
    a, b = (sum(getattr(p, name).double() * (p.n / total) for p in parts) for name in ("a", "b"))
    return Factors(torch.as_tensor(a), torch.as_tensor(b), total)


class Subspace:
    """The changes of a weight (d, f) that equation 2 lets through."""

    def __init__(self, factors: Factors, gamma: float) -> None:
        of_a, u_a = torch.linalg.eigh(factors.a.double())
        of_b, u_b = torch.linalg.eigh(factors.b.double())
        free = may_change(torch.outer(of_b.clamp(min=0), of_a.clamp(min=0)), gamma)
        if not free.any():
            raise BadEditor(f"gamma {gamma:g} holds all {free.numel():,} directions of a weight fixed: lower it")
        self.u_a, self.u_b, self.free = u_a.float(), u_b.float(), free

    def project(self, change: Float[Tensor, "d f"]) -> Float[Tensor, "d f"]:
        """P(D), float32."""
        return self.u_b @ ((self.u_b.T @ change @ self.u_a) * self.free) @ self.u_a.T


def may_change(costs: Float[Tensor, "d f"], gamma: float) -> Bool[Tensor, "d f"]:
    """M: False where one of the fewest largest costs lies that hold the share gamma of the sum; True for all where gamma is 0."""
    if gamma == 0:
        return torch.ones_like(costs, dtype=torch.bool)
    largest = costs.flatten().sort(descending=True).values
    held = int((largest.cumsum(0) < gamma * largest.sum()).sum())
    return costs < largest[min(held, len(largest) - 1)]


def text_factors(
    handle: ModelHandle, corpus: Corpus, layers: Sequence[int], positions: int, notes: list[str] | None = None
) -> dict[int, Factors]:
    """The factors of these layers over the first `positions` of a corpus, under the base weights.

    Kept on the handle and, where it has a folder for what runs share, on disk. `notes` gets a line on what was read.
    """
    kept: dict[Any, dict[int, Factors]] = handle.cache.setdefault("K-FAC factors", {})
    key = (handle.hash, corpus.hash, "-".join(map(str, layers)), positions)
    path = handle.cache_folder / "kfac" / f"{'-'.join(map(str, key))}.safetensors" if handle.cache_folder is not None else None
    if key not in kept:
        stored = _stored(path, layers) if path is not None and path.is_file() else None
        kept[key] = stored or factors(handle, batches(handle, corpus), layers, positions)
        if path is not None and stored is None:
            _store(path, kept[key])
    if notes is not None:
        notes.append(f"K-FAC factors of layers {', '.join(map(str, layers))} from {corpus.source}: {kept[key][layers[0]].n:,} positions")
    return kept[key]


def factors(handle: ModelHandle, batches: Iterable[Batch], layers: Sequence[int], positions: int | None = None) -> dict[int, Factors]:
    """Equation 1 by layer, from the first `positions` that predict a token of these batches (None: from all), under the weights as
    they are. The loss is the sum over tokens. Raises `BadEditor` where there is none."""
    sums: dict[int, tuple[Tensor, Tensor]] = {}
    seen = 0
    for batch in batches:
        rows = _rows(handle, batch, layers)
        for n, (a, g) in rows.items():
            old = sums.get(n, (0.0, 0.0))
            sums[n] = (old[0] + (a.T @ a).double(), old[1] + (g.T @ g).double())
        seen += len(rows[layers[0]][0])
        if positions is not None and seen >= positions:
            break
    if not seen:
        raise BadEditor("there is no general text, from which the curvature of a weight is estimated: give some with corpus=FILE")
    return {n: Factors(a / seen, g / seen, seen) for n, (a, g) in sums.items()}


def batches(handle: ModelHandle, corpus: Corpus) -> Iterator[Batch]:
    """A corpus in batches that are small enough for a backward."""
    return corpus_batches(handle, corpus, _ROWS, _TOKENS)


def _store(path: Path, found: dict[int, Factors]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.{n}": getattr(f, name).cpu() for n, f in found.items() for name in ("a", "b")}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={str(n): str(f.n) for n, f in found.items()})


def _stored(path: Path, layers: Sequence[int]) -> dict[int, Factors]:
    """Raises `BadEditor` for a file that cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            counts = file.metadata()
            return {n: Factors(file.get_tensor(f"a.{n}"), file.get_tensor(f"b.{n}"), int(counts[str(n)])) for n in layers}
    except (SafetensorError, OSError, KeyError, ValueError) as e:
        raise BadEditor(f"K-FAC factors {path} cannot be read ({e}): remove the file, and they are computed anew") from e


def _rows(handle: ModelHandle, batch: Batch, layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """By layer a (n, f) and g (n, d), float32, at the positions that predict a token."""
    read, targets = _predicting(batch)
    act: dict[int, Tensor] = {}
    probes: dict[int, Tensor] = {}

    def watch(layer: int, entering: Tensor, out: Tensor) -> Tensor:
        act[layer], probes[layer] = entering.detach(), torch.zeros_like(out, requires_grad=True)
        return out + probes[layer]

    suffix = suffix_from_layer(handle, batch, layers[0])
    with torch.enable_grad(), ExitStack() as stack:
        for n in layers:
            stack.enter_context(handle.hooked(handle.down(n), lambda m, args, out, n=n: watch(n, args[0], out)))
        loss = answer_nll(handle, suffix.final_hidden(suffix.run(suffix.hidden), read), targets).sum()
        gradients = torch.autograd.grad(loss, [probes[n] for n in layers])

    def at(x: Tensor) -> Tensor:
        return x.reshape(*read.shape, -1)[read.to(x.device)].float()

    return {n: (at(act[n]), at(g)) for n, g in zip(layers, gradients)}


def _predicting(batch: Batch) -> tuple[Tensor, Tensor]:
    """(B, T) bool: the positions that predict a token of an answer or, of running text, of the text; and these tokens (n,)."""
    if batch.asks:
        return batch.before_answer, batch.answer_ids
    real = batch.prompt
    read = torch.cat([real[:, :-1] & real[:, 1:], torch.zeros_like(real[:, :1])], 1)
    return read, batch.inputs["input_ids"].roll(-1, 1)[read]
