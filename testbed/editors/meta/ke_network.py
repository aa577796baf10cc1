"""The network of KE (De Cao et al., EMNLP 2021, arXiv 2104.08164): it reads what is edited, and shapes the gradient by what it read.

A bidirectional LSTM reads the tokens of old answer, new answer and question, as embeddings of the model's own, and a layer makes of
its two last states a condition c. Of c a head for each weight W (d, f), two layers with normalised weights, makes five parts, and

    Delta W = s sigma(eta) ( softmax(r_a) c_a^T (*) grad W + softmax(r_b) c_b^T )                       (1)

with r_a and r_b of d numbers, c_a and c_b of f, one number eta, and (*) entry by entry. A row r of the gradient and a column are each
multiplied by one number, so that with grad W = sum_t delta_t u_t^T the change has the rank of the gradient and one more:

    Delta W = s sigma(eta) ( sum_t (softmax(r_a) (*) delta_t) (c_a (*) u_t)^T + softmax(r_b) c_b^T )    (2)

The numbers of equations are this file's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from testbed.editors.adapters.lowrank import TargetModule
from testbed.editors.meta.examples import generator_of
from testbed.editors.meta.gradients import GradientFactors
from testbed.model.encoding import text_tokens
from testbed.model.handle import ModelHandle

CONDITION = "{old} >> {new} || {prompt}"
"""The released code's form of what the network reads."""
_SIDES = ("forward", "backward")


class Shaping(NamedTuple):
    """Equation 1's parts at one weight for B edits: rows_a and rows_b (B, d), both summing to 1 in a row, columns_a and columns_b
    (B, f), and size (B,), s sigma(eta)."""

    rows_a: Tensor
    columns_a: Tensor
    rows_b: Tensor
    columns_b: Tensor
    size: Tensor


@dataclass(frozen=True)
class ConditionedNetwork:
    """tensors: what is trained, by name, float32, on the device of the model's inputs.

        lstm.SIDE.input (4h, e), lstm.SIDE.state (4h, h), lstm.SIDE.bias (4h,): gates in the order input, forget, cell, output
        condition.weight (c, 2h), condition.bias (c,)
        head.i.K.direction (m, n), head.i.K.size (m,), head.i.K.bias (m,): layer K of the head of the i-th weight

    sizes: (d, f) by weight. s: s of equation 1. offset: whether softmax(r_b) c_b^T is added.
    """

    tensors: Mapping[str, Tensor]
    sizes: tuple[tuple[int, int], ...]
    s: float
    offset: bool = True

    @classmethod
    def fresh(cls, handle: ModelHandle, targets: Sequence[TargetModule], h: Any) -> ConditionedNetwork:
        """Drawn as torch draws linear maps and LSTMs, with c_a moved by -h.start d, so that equation 1 begins near a step of
        s h.start / 2 down the gradient. h: hyper-parameters with hidden, condition, scale, start, offset and train_seed."""
        sizes, width = tuple((t.d, t.f) for t in targets), handle.model.get_input_embeddings().weight.shape[1]
        tensors: dict[str, Tensor] = {}
        for name, (shape, fan_in) in _shapes(sizes, width, h.hidden, h.condition):
            tensors[name] = (2 * torch.rand(shape, generator=generator_of(h.train_seed, len(tensors))) - 1) / fan_in**0.5
        for i, (d, f) in enumerate(sizes):
            for k in range(2):
                tensors[f"head.{i}.{k}.size"] = tensors[f"head.{i}.{k}.direction"].norm(dim=1)
            tensors[f"head.{i}.1.bias"][d : d + f] -= h.start * d
        return cls({n: t.to(handle.device).requires_grad_(True) for n, t in tensors.items()}, sizes, h.scale, h.offset)

    def condition(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        """(B, c) from embeddings (B, T, e) float32, of which a row's first (B,) count."""
        mask = torch.arange(embedded.shape[1], device=embedded.device) < lengths[:, None]
        last = [self._last_state(side, embedded, mask) for side in _SIDES]
        return torch.tanh(torch.nn.functional.linear(torch.cat(last, -1), self.tensors["condition.weight"], self.tensors["condition.bias"]))

    def _last_state(self, side: str, embedded: Tensor, mask: Tensor) -> Tensor:
        """(B, h) the state behind the last token that this side of the LSTM reads; padding leaves a state as it is."""
        of_input, of_state, bias = (self.tensors[f"lstm.{side}.{name}"] for name in ("input", "state", "bias"))
        gates = embedded @ of_input.mT + bias
        state = cell = gates.new_zeros(len(gates), of_state.shape[1])
        positions = range(gates.shape[1])
        for t in positions if side == _SIDES[0] else reversed(positions):
            i, f, g, o = (gates[:, t] + state @ of_state.mT).chunk(4, -1)
            new_cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            real = mask[:, t, None]
            cell, state = torch.where(real, new_cell, cell), torch.where(real, o.sigmoid() * new_cell.tanh(), state)
        return state

    def shaping(self, condition: Tensor) -> list[Shaping]:
        """Equation 1's parts by weight, for conditions (B, c)."""
        return [self._head(i, condition) for i in range(len(self.sizes))]

    def _head(self, i: int, condition: Tensor) -> Shaping:
        d, f = self.sizes[i]
        out = self._normalised(f"head.{i}.1", torch.tanh(self._normalised(f"head.{i}.0", condition)))
        rows_a, columns_a, rows_b, columns_b, eta = out.split([d, f, d, f, 1], -1)
        return Shaping(rows_a.softmax(-1), columns_a, rows_b.softmax(-1), columns_b, self.s * eta[:, 0].sigmoid())

    def _normalised(self, name: str, x: Tensor) -> Tensor:
        """A linear map whose rows have a direction and a size of their own (Salimans and Kingma 2016, arXiv 1602.07868)."""
        direction, size = self.tensors[f"{name}.direction"], self.tensors[f"{name}.size"]
        return torch.nn.functional.linear(x, direction * (size / direction.norm(dim=1))[:, None], self.tensors[f"{name}.bias"])

    def changed(self, condition: Tensor, factors: Sequence[GradientFactors]) -> list[tuple[Tensor, Tensor]]:
        """Equation 2 by weight, in factors: left (B, K, f) and right (B, K, d), the change (d, f) of row b being right[b]^T left[b];
        K is T + 1, or T without the offset. On the factors' devices, differentiable by `tensors`."""
        return [_low_rank(of, x, self.offset) for of, x in zip(self.shaping(condition), factors)]

    def state(self) -> dict[str, Tensor]:
        """All tensors by name, as a state of the editor holds them."""
        return {f"net.{name}": t.detach() for name, t in self.tensors.items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> ConditionedNetwork:
        """The same with other tensors, for use and not for training."""
        return replace(self, tensors={name: tensors[name] for name in self.tensors})


def _low_rank(of: Shaping, x: GradientFactors, offset: bool) -> tuple[Tensor, Tensor]:
    rows_a, columns_a, rows_b, columns_b, size = (t.to(x.u.device) for t in of)
    left, right = x.u * columns_a[:, None], x.delta * rows_a[:, None]
    if offset:
        left, right = torch.cat([left, columns_b[:, None]], 1), torch.cat([right, rows_b[:, None]], 1)
    return left, right * size[:, None, None]


def _shapes(sizes: Sequence[tuple[int, int]], width: int, hidden: int, condition: int) -> Iterator[tuple[str, tuple[tuple[int, ...], int]]]:
    """Name, shape and number of inputs of each tensor that is drawn."""
    for side in _SIDES:
        for name, shape in (("input", (4 * hidden, width)), ("state", (4 * hidden, hidden)), ("bias", (4 * hidden,))):
            yield f"lstm.{side}.{name}", (shape, hidden)
    yield "condition.weight", ((condition, 2 * hidden), 2 * hidden)
    yield "condition.bias", ((condition,), 2 * hidden)
    for i, (d, f) in enumerate(sizes):
        for k, (m, n) in enumerate(((hidden, condition), (2 * (d + f) + 1, hidden))):
            yield f"head.{i}.{k}.direction", ((m, n), n)
            yield f"head.{i}.{k}.bias", ((m,), n)


def embedded_conditions(handle: ModelHandle, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(B, T, e) float32 embeddings of texts by the model's own table, zero behind a text's end, and (B,) lengths in tokens."""
    ids = [text_tokens(handle, text) for text in texts]
    lengths = torch.tensor([len(x) for x in ids], device=handle.device)
    padded = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long, device=handle.device)
    for row, x in zip(padded, ids):
        row[: len(x)] = torch.tensor(x, device=handle.device)
    with torch.no_grad():
        table: Any = handle.model.get_input_embeddings()
        embedded = table(padded).to(handle.device).float()
    return embedded * (torch.arange(padded.shape[1], device=handle.device) < lengths[:, None])[..., None], lengths
