"""Targets: for each edit the change of one layer's output, at the subject's last token, under which the model gives the new answer.

    L(delta) = mean over contexts [-(1/m) sum_t log p(o_t | ...)] + kl KL(p_delta || p_0) + decay ||delta|| / ||h_0||^2

(Meng et al. 2022, 2023, as released: the decay is the first power over the square.) All edits of a batch are
optimised together, each with its own Adam moments, clamp and stop, so an edit's target does not depend on its
batch mates. Layers up to the one that is changed, and all columns before the lookup position, run once; the
head runs at answer positions only, nothing behind the last of them runs, and edits with as much to run share a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from testbed.core.events import EditEvent
from testbed.editors.base import EditFailed
from testbed.editors.locate.positions import Rows, answer_rows, columns, joined, prompt_rows, subject_rows
from testbed.model.answer_loss import answer_loss
from testbed.model.handle import ModelHandle
from testbed.model.suffix import enter, row_mean
from testbed.model.suffix_columns import Behind, behind

_LEAST = 8
"""Fewer edits than this do not get a forward of their own for having less to run."""
_FEW = 16
"""Columns that cost less to run in vain than a forward does to call."""


class Search(Protocol):
    """What the search for a target is told (fields of `Hyper`)."""

    @property
    def steps(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def decay(self) -> float: ...
    @property
    def clamp(self) -> float: ...
    @property
    def kl(self) -> float: ...
    @property
    def stop(self) -> float: ...


@dataclass(frozen=True)
class Task:
    """One search: which edits, at which layer's output, in which contexts, whether the end token is part of the answer."""

    handle: ModelHandle
    events: Sequence[EditEvent]
    layer: int
    contexts: Sequence[str]
    end: bool = True

    def part(self, keep: list[int]) -> Task:
        """The same for some of the edits."""
        return Task(self.handle, [self.events[i] for i in keep], self.layer, self.contexts, self.end)


@dataclass(frozen=True)
class Found:
    """What a search found for n edits.

    delta: (n, d) float32 change of the layer's output. loss: (n,) last loss (nats). steps: (n,) optimiser steps taken.
    """

    delta: Tensor
    loss: Tensor
    steps: Tensor


class Forward:
    """The loss of a delta for each edit, with all that it cannot change run once.

    A method that looks for several changes at once puts them side by side: delta is then (n, parts d).
    Answers and essences share a forward where that adds little but saves its calls.
    """

    def __init__(self, task: Task) -> None:
        self.n, self.layer, self.handle = len(task.events), task.layer, task.handle
        self.rows = answer_rows(task.handle, task.events, task.contexts, task.end)
        self.essence = subject_rows(task.handle, task.events)
        self.before: Tensor | None = None
        self.parts = [(rows, rows.read, self._enter(task, rows, width)) for rows, width in self._shared(task)]

    def _shared(self, task: Task) -> list[tuple[Rows, int]]:
        """The rows of each forward and how many of their columns are run."""
        if self.essence is None:
            return [(self.rows, self.rows.width)]
        if _cheap(self.rows, self.essence):
            return [(joined(task.handle, self.rows, self.essence), self.rows.width)]
        return [(self.rows, self.rows.width), (self.essence, 1)]

    def _enter(self, task: Task, rows: Rows, width: int | None) -> Behind:
        return behind(task.handle, rows.batch, task.layer + 1, int(rows.at[0]), width)

    def losses(self, delta: Tensor, kl: float) -> Tensor:
        """(n,) negative log-likelihood of the answers, mean over tokens then contexts, plus kl times the drift of the essence."""
        answers, essence = self._read(delta, drift=bool(kl))
        loss = self._over_edits(self._answers(answers)[0])
        return loss + kl * self._drift(essence) if kl else loss

    def done(self, loss: Tensor, stop: float) -> Tensor:
        """(n,) bool: the edits whose target is found, by the loss with its decay."""
        return loss < stop

    def _read(self, delta: Tensor, drift: bool = True) -> tuple[Tensor, Tensor]:
        """What enters the head where answer tokens are predicted (m, d), and for the drift where subjects end (k, d), deltas in place."""
        parts = self.parts if drift else self.parts[:1]
        ends = [self._ends(behind, delta[rows.edit], int(rows.at[0]), at) for rows, at, behind in parts]
        m = len(self.rows.batch.answer_ids)
        together = torch.cat(ends) if len(ends) > 1 else ends[0]
        return together[:m], together[m:]

    def _answers(self, ends: Tensor) -> tuple[Tensor, Tensor]:
        """(m,) loss of each answer token of all rows, nats, and (m,) whether it is the likeliest."""
        return answer_loss(self.handle, ends, self.rows.batch.answer_ids)

    def _over_edits(self, values: Tensor) -> Tensor:
        """(n,) mean over a row's answer tokens, then over an edit's rows."""
        row = self.rows.batch.before_answer.nonzero()[:, 0]
        return row_mean(row_mean(values, row, len(self.rows.edit)), self.rows.edit, self.n)

    def _ends(self, rows: Behind, delta: Tensor, column: int, at: Tensor) -> Tensor:
        """(m, d) what enters the head at `at` with each row's delta in place."""
        return rows.ends(delta, column, at)

    def _drift(self, ends: Tensor) -> Tensor:
        """(n,) KL(p_delta || p_0) of the next token after the subject; 0 for edits whose prompt names none."""
        none = torch.zeros(self.n, device=self.rows.edit.device)
        if self.essence is None:
            return none
        logp = self.handle.head(ends).to(self.handle.device).float().log_softmax(-1)
        if self.before is None:
            self.before = logp.detach()
        drift = (logp.exp() * (logp - self.before)).sum(-1)
        return none.index_add(0, self.essence.edit, drift)


def _cheap(rows: Rows, essence: Rows) -> bool:
    """Whether the columns that essences are run for in vain, beside answers, are few; beside pictures they are not."""
    return not rows.batch.picture.any() and len(essence.edit) * (rows.width - 1) <= max(_FEW, len(rows.edit) * rows.width / _LEAST)


class Adam:
    """Adam with moments a row, so that rows can stop and leave (beta 0.9 and 0.999, eps 1e-8)."""

    def __init__(self, like: Tensor, lr: float) -> None:
        self.lr, self.t = lr, 0
        self.m, self.v = torch.zeros_like(like), torch.zeros_like(like)

    def step(self, grad: Tensor) -> Tensor:
        """What to add to the parameter."""
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * grad
        self.v = 0.999 * self.v + 0.001 * grad.square()
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        return -self.lr * m / (v.sqrt() + 1e-8)

    def keep(self, rows: Tensor) -> None:
        self.m, self.v = self.m[rows], self.v[rows]


def search(task: Task, h: Search, scale: Tensor, forward_of: type[Forward] = Forward) -> Found:
    """Optimise one delta an edit until its loss is under `h.stop` or `h.steps - 1` steps are taken (the last only reads).

    scale: (n,), or (n, parts), norm of what each part of the delta is added to: the clamp's and the decay's unit.
    Raises `EditFailed` when a loss is not finite.
    """
    scale = scale.reshape(len(scale), -1)
    found = _nothing(task, scale)
    for keep in _alike(task):
        part = _search(task.part(keep), h, scale[keep], forward_of)
        found.delta[keep], found.loss[keep], found.steps[keep] = part.delta, part.loss, part.steps
    return found


def _alike(task: Task) -> list[list[int]]:
    """The edits in groups with as many columns to run, so that little of a forward is padding."""
    width = [columns(task.handle, e, task.end) for e in task.events]
    groups: list[list[int]] = [[]]
    for edit in sorted(range(len(width)), key=width.__getitem__):
        if len(groups[-1]) >= _LEAST and width[edit] > width[groups[-1][-1]]:
            groups.append([])
        groups[-1].append(edit)
    if len(groups) > 1 and len(groups[-1]) < _LEAST:
        few = groups.pop()
        groups[-1] += few
    return groups


def _nothing(task: Task, scale: Tensor) -> Found:
    """Where a search begins."""
    n, parts = scale.shape
    none = torch.zeros(n, device=scale.device)
    return Found(torch.zeros(n, parts * task.handle.width, device=scale.device), none, none.clone())


def _search(task: Task, h: Search, scale: Tensor, forward_of: type[Forward]) -> Found:
    found = _nothing(task, scale)
    live = torch.arange(len(scale), device=scale.device)
    forward, adam, delta = forward_of(task), Adam(found.delta, h.lr), found.delta.clone()
    for step in range(h.steps):
        loss, grad = _value(forward, delta, h, scale[live])
        _finite(loss + grad.sum(1), [task.events[i] for i in live.tolist()], h.lr)
        found.loss[live], found.delta[live] = loss, delta
        going = ~forward.done(loss, h.stop)
        if step == h.steps - 1 or not going.any():
            break
        found.steps[live[going]] += 1
        delta = torch.where(going[:, None], _clamped(delta + adam.step(grad), h.clamp * scale[live]), delta)
        if 2 * int(going.sum()) <= len(going):
            rows = going.nonzero()[:, 0]
            live, delta, before = live[rows], delta[rows], forward.before
            adam.keep(rows)
            forward = _smaller(forward_of(task.part(live.tolist())), before, rows, forward)
    return found


def _parts(delta: Tensor, scale: Tensor) -> Tensor:
    """(n, parts, d) from (n, parts d)."""
    return delta.reshape(*scale.shape, -1)


def _value(forward: Forward, delta: Tensor, h: Search, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) losses and (n, parts d) gradient."""
    with torch.enable_grad():
        own = delta.detach().requires_grad_(True)
        loss = forward.losses(own, h.kl) + h.decay * (_parts(own, scale).norm(dim=2) / scale.square()).sum(1)
        (grad,) = torch.autograd.grad(loss.sum(), own)
    return loss.detach(), grad


def _smaller(new: Forward, before: Tensor | None, rows: Tensor, old: Forward) -> Forward:
    """Carry the essence of the unchanged model over to the edits that go on."""
    if before is not None and old.essence is not None:
        new.before = before[torch.isin(old.essence.edit, rows)]
    return new


def _clamped(delta: Tensor, limit: Tensor) -> Tensor:
    """Parts no longer than their limit (n, parts)."""
    parts = _parts(delta, limit)
    return (parts * (limit / parts.norm(dim=2).clamp(min=1e-30)).clamp(max=1)[:, :, None]).reshape(delta.shape)


def _finite(loss: Tensor, events: list[EditEvent], lr: float) -> None:
    bad = [e.prompt for e, ok in zip(events, torch.isfinite(loss).tolist()) if not ok]
    if bad:
        raise EditFailed(f"the loss of {bad[0]!r} is not finite at lr {lr}; try a smaller one")


@torch.no_grad()
def heights(handle: ModelHandle, events: Sequence[EditEvent], layer: int) -> Tensor:
    """(n, d) float32 output of the layer where each bare prompt's subject ends, beside the model's inputs."""
    rows = prompt_rows(handle, events, [""])
    above = enter(handle, rows.batch, layer + 1, layer + 1)
    return above.hidden.to(handle.device)[torch.arange(len(events), device=handle.device), rows.at].float()


@torch.no_grad()
def parts_of(handle: ModelHandle, events: Sequence[EditEvent], layer: int) -> tuple[Tensor, Tensor]:
    """(n, d) float32 outputs of the layer's attention and of its MLP where each bare prompt's subject ends, beside the model's inputs."""
    rows = prompt_rows(handle, events, [""])
    above = enter(handle, rows.batch, layer, layer)
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            kept[name] = (output[0] if isinstance(output, tuple) else output).reshape(*rows.batch.prompt.shape, -1).clone()

        return hook

    with handle.hooked(handle.attention(layer), keep("attention")), handle.hooked(handle.down(layer), keep("mlp")):
        above.layer(layer, above.hidden)
    each = torch.arange(len(events), device=rows.at.device)
    attention, mlp = (kept[name].to(each.device)[each, rows.at].float() for name in ("attention", "mlp"))
    return attention, mlp
