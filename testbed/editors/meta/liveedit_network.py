"""LiveEdit's trained module (equations 1 to 5 in `liveedit.py`): what it reads in an edit and in a question, and what experts add.

Everything is a cross-attention over hidden states of one layer, with learned queries or with what such queries have read before. Edits
and questions have extractors of their own with the same form.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from testbed.editors.meta.examples import generator_of
from testbed.model.encoding import Batch

Side = Literal["edit", "ask"]


@dataclass(frozen=True)
class RowMasks:
    """Where the parts of B rows of T positions lie, each (B, T) bool: the words of the question, its picture, and all of the row, with
    the answer where it has one."""

    question: Tensor
    picture: Tensor
    whole: Tensor

    @classmethod
    def of(cls, batch: Batch) -> RowMasks:
        return cls(batch.prompt & ~batch.picture, batch.picture, batch.prompt | batch.answer)

    def first(self, rows: int) -> RowMasks:
        """The same of the first rows alone."""
        return RowMasks(self.question[:rows], self.picture[:rows], self.whole[:rows])


@dataclass(frozen=True)
class Features:
    """What is read in B questions, float32, e vectors of width m each.

    textual: (B, e, m) of the text. visual: (B, e, m) what the question picks out of its picture; zeros without one. sentinel: (B, e, m)
    what it picks out of the learned states that stand for a picture of no edit; zeros on the side of edits. pictured: (B,) bool.
    """

    textual: Tensor
    visual: Tensor
    sentinel: Tensor
    pictured: Tensor

    @classmethod
    def joined(cls, *parts: Features) -> Features:
        """The rows of several behind one another."""
        return cls(*(torch.cat(column) for column in zip(*((p.textual, p.visual, p.sentinel, p.pictured) for p in parts))))

    def __getitem__(self, rows: Any) -> Features:
        return Features(self.textual[rows], self.visual[rows], self.sentinel[rows], self.pictured[rows])

    def flat(self) -> Tensor:
        """(B, 3 e m + 1) all of them in one row a question."""
        parts = [t.flatten(1) for t in (self.textual, self.visual, self.sentinel)]
        return torch.cat([*parts, self.pictured[:, None].to(self.textual)], 1)

    @classmethod
    def of_flat(cls, rows: Tensor, e: int) -> Features:
        """What `flat` made."""
        textual, visual, sentinel = (t.unflatten(1, (e, -1)) for t in rows[:, :-1].chunk(3, 1))
        return cls(textual, visual, sentinel, rows[:, -1] > 0)


@dataclass(frozen=True)
class Experts:
    """n experts with what routes to them, float32.

    ids: their edits. u, v: (n, r, d). visual, textual: (n, e, m) features of their edits. pictured: (n,) bool.
    """

    ids: tuple[str, ...]
    u: Tensor
    v: Tensor
    visual: Tensor
    textual: Tensor
    pictured: Tensor

    def __len__(self) -> int:
        return len(self.ids)


def similarity(a: Tensor, b: Tensor) -> Tensor:
    """(B, n) equation 3 of features (B, e, m) and (n, e, m): the mean over e of the dot products, divided by the root of m."""
    return torch.einsum("bem,nem->bn", a, b) / (a.shape[1] * a.shape[2] ** 0.5)


def own_similarity(a: Tensor, b: Tensor) -> Tensor:
    """(B,) the same of each row with its own."""
    return (a * b).sum((1, 2)) / (a.shape[1] * a.shape[2] ** 0.5)


def passing(asked: Features, visual: Tensor, textual: Tensor, pictured: Tensor) -> Tensor:
    """(B, n) bool, equation 4: the experts that hard routing leaves to each question, from (B, n) similarities by picture and by text.

    With a picture an expert has to be more similar than the sentinel; without one its words have to be similar at all (ours). A question
    with a picture has no expert of an edit without one, and the other way round.
    """
    least = own_similarity(asked.visual, asked.sentinel)[:, None]
    near = torch.where(asked.pictured[:, None], visual > least, textual > 0)
    return near & (asked.pictured[:, None] == pictured[None])


def soft_weights(textual: Tensor, passed: Tensor) -> Tensor:
    """(B, n) equation 5 from (B, n) similarities of words: the softmax over the experts that passed, times the sigmoid; 0 for others."""
    among = textual.masked_fill(~passed, torch.finfo(textual.dtype).min).softmax(1)
    return torch.where(passed, among * textual.sigmoid(), 0.0)


@dataclass(frozen=True)
class ExpertNetwork:
    """tensors: what is trained, by name, float32. heads: of each attention. scale: what generated experts are divided by.

        PART.queries (e, m) or (r, m), PART.wq (m, m), PART.wk (m, d), PART.wv (m or d, d), and their biases PART.bq, PART.bk, PART.bv
        NORM.gain (d,), NORM.bias (d,)
        sentinel (p, d)

    Parts: SIDE.pick reads in the words what to look for, SIDE.look reads the picture with it, SIDE.text reads the words (SIDE is edit
    or ask); u and v read the whole edit. Norms: one for SIDE.pick and SIDE.look, one for each other part, and `act` of what experts read.
    """

    tensors: Mapping[str, Tensor]
    heads: int
    scale: float

    @classmethod
    def fresh(cls, d: int, h: Any, device: torch.device) -> ExpertNetwork:
        """Linear maps as torch draws them, queries of unit deviation. h: hyper-parameters, filled in."""
        generator, tensors = generator_of(h.train_seed, 0), dict[str, Tensor]()
        m = h.width
        for part in ("edit.pick", "edit.look", "edit.text", "ask.pick", "ask.look", "ask.text", "u", "v"):
            tensors |= dict(_linear_maps(part, m, (d, d if part in ("u", "v") else m), generator))
        counts = {"u": h.rank, "v": h.rank, **{f"{side}.{part}": h.queries for side in ("edit", "ask") for part in ("pick", "text")}}
        tensors |= {f"{part}.queries": torch.randn(n, m, generator=generator) for part, n in counts.items()}
        tensors["sentinel"] = torch.randn(h.sentinel, d, generator=generator)
        for norm in ("edit.pick", "edit.text", "ask.pick", "ask.text", "u", "v", "act"):
            tensors |= {f"{norm}.gain": torch.ones(d), f"{norm}.bias": torch.zeros(d)}
        own = {name: t.to(device).requires_grad_(True) for name, t in tensors.items()}
        return cls(own, h.heads, h.scale)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> ExpertNetwork:
        """The same network with other tensors."""
        return ExpertNetwork(dict(tensors), self.heads, self.scale)

    def _norm(self, name: str, states: Tensor) -> Tensor:
        return functional.layer_norm(states, states.shape[-1:], self.tensors[f"{name}.gain"], self.tensors[f"{name}.bias"])

    def _attend(self, part: str, queries: Tensor, states: Tensor, seen: Tensor) -> Tensor:
        """(B, q, out) of queries (B or 1, q, m) over normalised states (B, T, d) at positions seen (B, T); zeros where there is none."""
        t, heads = self.tensors, self.heads
        q, k, v = (
            functional.linear(x, t[f"{part}.w{n}"], t[f"{part}.b{n}"]).unflatten(-1, (heads, -1))
            for n, x in (("q", queries), ("k", states), ("v", states))
        )
        scores = torch.einsum("bqhm,bthm->bhqt", q.expand(len(states), -1, -1, -1), k) / q.shape[-1] ** 0.5
        at = seen[:, None, None]
        share = scores.masked_fill(~at, torch.finfo(scores.dtype).min).softmax(-1) * at
        return torch.einsum("bhqt,bthm->bqhm", share, v).flatten(2)

    def features(self, side: Side, states: Tensor, masks: RowMasks) -> Features:
        """Equations 1 and 2: the features of B questions from their hidden states (B, T, d)."""
        t = self.tensors
        states = torch.where(masks.whole[..., None], states.float(), 0.0)
        normed = self._norm(f"{side}.pick", states)
        picked = self._attend(f"{side}.pick", t[f"{side}.pick.queries"][None], normed, masks.question)
        visual = self._attend(f"{side}.look", picked, normed, masks.picture)
        textual = self._attend(f"{side}.text", t[f"{side}.text.queries"][None], self._norm(f"{side}.text", states), masks.question)
        sentinel = torch.zeros_like(visual)
        if side == "ask":
            stand_in = self._norm(f"{side}.pick", t["sentinel"])[None].expand(len(states), -1, -1)
            every = torch.ones(stand_in.shape[:2], dtype=torch.bool, device=states.device)
            sentinel = self._attend(f"{side}.look", picked, stand_in, every)
        return Features(textual, visual, sentinel, masks.picture.any(1))

    def experts(self, states: Tensor, masks: RowMasks) -> tuple[Tensor, Tensor]:
        """U and V (B, r, d) of B edits from their hidden states (B, T, d), the answer's included."""
        states = torch.where(masks.whole[..., None], states.float(), 0.0)
        u, v = (
            self._attend(n, self.tensors[f"{n}.queries"][None], self._norm(n, states), masks.whole)
            / (self.scale * len(self.tensors[f"{n}.queries"]) ** 0.5)
            for n in ("u", "v")
        )
        return u, v

    def added(self, states: Tensor, u: Tensor, v: Tensor, weights: Tensor) -> Tensor:
        """(B, T, d) float32, what n experts (n, r, d) with weights (B, n) add to hidden states (B, T, d)."""
        fired = torch.einsum("btd,nrd->btnr", self._norm("act", states.float()), u).relu()
        return torch.einsum("btnr,nrd->btd", fired * weights[:, None, :, None], v)

    def route(self, experts: Experts, asked: Features) -> tuple[Tensor, Tensor]:
        """((B, n) weights, (B, n) bool whether an expert passed) of the experts for questions with these features."""
        textual = similarity(asked.textual, experts.textual)
        passed = passing(asked, similarity(asked.visual, experts.visual), textual, experts.pictured)
        return soft_weights(textual, passed), passed


def _linear_maps(part: str, m: int, sizes: tuple[int, int], generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """The maps of one attention of width m that reads states of the first size and gives numbers of the second, as torch draws them."""
    d, out = sizes
    for n, rows, columns in (("q", m, m), ("k", m, d), ("v", out, d)):
        yield f"{part}.w{n}", (2 * torch.rand(rows, columns, generator=generator) - 1) / columns**0.5
        yield f"{part}.b{n}", (2 * torch.rand(rows, generator=generator) - 1) / columns**0.5
