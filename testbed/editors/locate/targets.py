"""Targets: for each edit the change of one layer's output, at the subject's last token, under which the model gives the new answer.

    L(delta) = mean over contexts [-(1/m) sum_t log p(o_t | ...)] + kl KL(p_delta || p_0) + decay ||delta|| / ||h_0||^2

(Meng et al. 2022 and 2023, as released: the decay is the first power over the square.)
All edits of a batch are optimised together, each with its own Adam moments, clamp and stop, so an edit's target does
not depend on its batch mates. Layers up to the one that changes, and all token positions before the subject's last,
run once; the head runs at answer positions only, and edits with as many positions to run share a forward.

Where a layer does more to its MLP's output than add it (a norm behind it, a gate), the change is one of that output and is
sought through what lies behind it, because only such a change is linear in the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from testbed.core.events import EditEvent
from testbed.editors.base import EditFailed
from testbed.editors.locate.keys import PromptRows, answer_rows, joined, kl_prompt_rows, positions_to_run, prompt_rows
from testbed.model.answer_loss import answer_loss
from testbed.model.handle import ModelHandle
from testbed.model.layout import adds_as_it_is
from testbed.model.packed_linear import QUICK_BFLOAT16, packed_layers
from testbed.model.suffix import ModelSuffix, mean_by_row, suffix_behind, suffix_from_layer

_SMALL_GROUP = 8
"""Fewer edits than this get no forward of their own for having fewer positions to run."""
_WASTED = 16
"""Positions run for nothing that cost less than the call of another forward."""


@dataclass(frozen=True)
class TargetTask:
    """One search: the edits, the layer whose output changes, the contexts before the prompts, and whether the end token is trained."""

    handle: ModelHandle
    events: Sequence[EditEvent]
    layer: int
    contexts: Sequence[str]
    end: bool = True

    def part(self, keep: list[int]) -> TargetTask:
        """The same search for some of the edits."""
        return TargetTask(self.handle, [self.events[i] for i in keep], self.layer, self.contexts, self.end)


@dataclass(frozen=True)
class Targets:
    """The result of a search for n edits.

    delta: (n, d) float32 change of the layer's output. loss: (n,) last loss (nats). steps: (n,) optimiser steps taken.
    """

    delta: Float[Tensor, "n d"]
    loss: Float[Tensor, " n"]
    steps: Float[Tensor, " n"]


class TargetLoss:
    """The loss of a delta for each edit, with all that the delta cannot change run once.

    A method that looks for several changes at once puts them side by side: delta is then (n, parts d).
    Answers and KL prompts share a forward where the positions run for nothing cost less than another call.
    """

    def __init__(self, task: TargetTask) -> None:
        self.n, self.layer, self.handle = len(task.events), task.layer, task.handle
        self.rows = answer_rows(task.handle, task.events, task.contexts, task.end)
        self.kl_rows = kl_prompt_rows(task.handle, task.events)
        self.unedited: Tensor | None = None
        self.parts = [(rows, rows.read, self._suffix(task, rows, width)) for rows, width in self._forwards(task)]

    def _forwards(self, task: TargetTask) -> list[tuple[PromptRows, int]]:
        """The rows of each forward and how many of their positions are run."""
        if self.kl_rows is None:
            return [(self.rows, self.rows.width)]
        if _share_forward(self.rows, self.kl_rows):
            return [(joined(task.handle, self.rows, self.kl_rows), self.rows.width)]
        return [(self.rows, self.rows.width), (self.kl_rows, 1)]

    def _suffix(self, task: TargetTask, rows: PromptRows, width: int) -> ModelSuffix:
        """The model from what the change enters on, at the rows' positions from the lookup position on."""
        start = int(rows.at[0])
        return suffix_behind(task.handle, rows.batch, task.layer, (start, start + width))

    def losses(self, delta: Float[Tensor, "n d"], kl: float) -> Float[Tensor, " n"]:
        """(n,) negative log-likelihood of the answers, mean over tokens then contexts, plus kl times the KL divergence."""
        answers, kl_prompts = self._read(delta, with_kl=bool(kl))
        loss = self._over_edits(self._answers(answers)[0])
        return loss + kl * self._divergence(kl_prompts) if kl else loss

    def done(self, loss: Float[Tensor, " n"], stop: float) -> Bool[Tensor, " n"]:
        """(n,) bool: the edits whose target is found, by the loss with its decay."""
        return loss < stop

    def _read(self, delta: Tensor, with_kl: bool = True) -> tuple[Tensor, Tensor]:
        """Final hidden states, deltas in place: where answer tokens are predicted (m, d), and at the KL prompts' ends (k, d)."""
        parts = self.parts if with_kl else self.parts[:1]
        final = [self._final_hidden(suffix, delta[rows.edit], int(rows.at[0]), read) for rows, read, suffix in parts]
        m = len(self.rows.batch.answer_ids)
        together = torch.cat(final) if len(final) > 1 else final[0]
        return together[:m], together[m:]

    def _final_hidden(self, suffix: ModelSuffix, delta: Tensor, position: int, read: Tensor) -> Tensor:
        """(m, d) final hidden states at `read` with each row's delta added at the position."""
        return suffix.final_hidden(suffix.run_with_added(self.layer, delta, position), read)

    def _answers(self, final: Tensor) -> tuple[Tensor, Tensor]:
        """(m,) loss of each answer token of all rows, nats, and (m,) whether it is the likeliest."""
        return answer_loss(self.handle, final, self.rows.batch.answer_ids)

    def _over_edits(self, values: Tensor) -> Tensor:
        """(n,) mean over a row's answer tokens, then over an edit's rows."""
        row = self.rows.batch.before_answer.nonzero()[:, 0]
        return mean_by_row(mean_by_row(values, row, len(self.rows.edit)), self.rows.edit, self.n)

    def _divergence(self, final: Tensor) -> Tensor:
        """(n,) KL(p_delta || p_0) of the next token after the KL prompt; 0 for edits whose prompt names no subject."""
        none = torch.zeros(self.n, device=self.rows.edit.device)
        if self.kl_rows is None:
            return none
        logp = self.handle.logits(final).float().log_softmax(-1)
        if self.unedited is None:
            self.unedited = logp.detach()
        divergence = (logp.exp() * (logp - self.unedited)).sum(-1)
        return none.index_add(0, self.kl_rows.edit, divergence)


def _share_forward(rows: PromptRows, kl_rows: PromptRows) -> bool:
    """Whether few positions are run for nothing when KL prompts share the answers' forward; beside pictures there are many."""
    wasted = len(kl_rows.edit) * (rows.width - 1)
    return not rows.batch.picture.any() and wasted <= max(_WASTED, len(rows.edit) * rows.width / _SMALL_GROUP)


class RowAdam:
    """Adam with moments for each row, so that rows can stop and leave (beta 0.9 and 0.999, eps 1e-8)."""

    def __init__(self, like: Tensor, lr: float) -> None:
        self.lr, self.t = lr, 0
        self.m, self.v = torch.zeros_like(like), torch.zeros_like(like)

    def step(self, grad: Tensor) -> Tensor:
        """The change of the parameter."""
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * grad
        self.v = 0.999 * self.v + 0.001 * grad.square()
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        return -self.lr * m / (v.sqrt() + 1e-8)

    def keep(self, rows: Tensor) -> None:
        """Drop the moments of all other rows."""
        self.m, self.v = self.m[rows], self.v[rows]


def search(task: TargetTask, h: Any, scale: Float[Tensor, "n ..."], loss_class: type[TargetLoss] = TargetLoss) -> Targets:
    """Optimise one delta an edit until its loss is under `h.stop` or `h.steps - 1` steps are taken (the last only reads).

    h: the hyper-parameters (`LocateConfig`), filled in.
    scale: (n,), or (n, parts), norm of the output that each part of the delta is added to: the unit of the clamp and the decay.
    Raises `EditFailed` when a loss is not finite.
    """
    scale = scale.reshape(len(scale), -1)
    found = _zero_targets(task, scale)
    for keep in _groups_of_like_width(task):
        with packed_layers(task.handle, task.layer + 1, dtype_of_products(h.products)):
            part = _search(task.part(keep), h, scale[keep], loss_class)
        found.delta[keep], found.loss[keep], found.steps[keep] = part.delta, part.loss, part.steps
    return found


def dtype_of_products(products: str) -> torch.dtype:
    """The dtype of a search's products with frozen weights: float32 where the processor is no faster in the one asked for."""
    return torch.bfloat16 if products == "bfloat16" and QUICK_BFLOAT16 else torch.float32


def notes_on_products(handle: ModelHandle, products: str) -> list[str]:
    """A sentence where the products asked for are not those of a search on this model."""
    if products == "float32" or (handle.device.type == "cpu" and handle.dtype == torch.float32 and QUICK_BFLOAT16):
        return []
    return [
        f"products={products} is for float32 models on processors with AVX-512 BF16 or AMX: the search multiplies in {handle.dtype} here"
    ]


def _groups_of_like_width(task: TargetTask) -> list[list[int]]:
    """The edits in groups with as many positions to run, so that little of a forward is padding."""
    width = [positions_to_run(task.handle, e, task.end) for e in task.events]
    groups: list[list[int]] = [[]]
    for edit in sorted(range(len(width)), key=width.__getitem__):
        if len(groups[-1]) >= _SMALL_GROUP and width[edit] > width[groups[-1][-1]]:
            groups.append([])
        groups[-1].append(edit)
    if len(groups) > 1 and len(groups[-1]) < _SMALL_GROUP:
        few = groups.pop()
        groups[-1] += few
    return groups


def _zero_targets(task: TargetTask, scale: Tensor) -> Targets:
    """Where a search begins."""
    n, parts = scale.shape
    none = torch.zeros(n, device=scale.device)
    return Targets(torch.zeros(n, parts * task.handle.width, device=scale.device), none, none.clone())


def _search(task: TargetTask, h: Any, scale: Tensor, loss_class: type[TargetLoss]) -> Targets:
    found = _zero_targets(task, scale)
    live = torch.arange(len(scale), device=scale.device)
    losses, adam, delta = loss_class(task), RowAdam(found.delta, h.lr), found.delta.clone()
    for step in range(h.steps):
        loss, grad = _loss_and_gradient(losses, delta, h, scale[live])
        _require_finite(loss + grad.sum(1), [task.events[i] for i in live.tolist()], h.lr)
        found.loss[live], found.delta[live] = loss, delta
        going = ~losses.done(loss, h.stop)
        if step == h.steps - 1 or not going.any():
            break
        found.steps[live[going]] += 1
        delta = torch.where(going[:, None], _clamped(delta + adam.step(grad), h.clamp * scale[live]), delta)
        if 2 * int(going.sum()) <= len(going):
            rows = going.nonzero()[:, 0]
            live, delta = live[rows], delta[rows]
            adam.keep(rows)
            losses = _with_reference(loss_class(task.part(live.tolist())), losses, rows)
    return found


def _by_part(delta: Tensor, scale: Tensor) -> Tensor:
    """(n, parts, d) from (n, parts d)."""
    return delta.reshape(*scale.shape, -1)


def _loss_and_gradient(losses: TargetLoss, delta: Tensor, h: Any, scale: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) losses and (n, parts d) gradient."""
    with torch.enable_grad():
        own = delta.detach().requires_grad_(True)
        loss = losses.losses(own, h.kl) + h.decay * (_by_part(own, scale).norm(dim=2) / scale.square()).sum(1)
        (grad,) = torch.autograd.grad(loss.sum(), own)
    return loss.detach(), grad


def _with_reference(new: TargetLoss, old: TargetLoss, rows: Tensor) -> TargetLoss:
    """The loss of the edits that go on, with the unedited model's answers to their KL prompts carried over."""
    if old.unedited is not None and old.kl_rows is not None:
        new.unedited = old.unedited[torch.isin(old.kl_rows.edit, rows)]
    return new


def _clamped(delta: Tensor, limit: Tensor) -> Tensor:
    """Parts no longer than their limit (n, parts)."""
    parts = _by_part(delta, limit)
    return (parts * (limit / parts.norm(dim=2).clamp(min=1e-30)).clamp(max=1)[:, :, None]).reshape(delta.shape)


def _require_finite(loss: Tensor, events: list[EditEvent], lr: float) -> None:
    bad = [e.prompt for e, ok in zip(events, torch.isfinite(loss).tolist()) if not ok]
    if bad:
        raise EditFailed(f"the loss of {bad[0]!r} is not finite at lr {lr}; try a smaller one")


@torch.no_grad()
def unchanged_outputs(handle: ModelHandle, events: Sequence[EditEvent], layer: int) -> Float[Tensor, "n d"]:
    """(n, d) float32 what a target's change is added to where each bare prompt's subject ends, on the device of the model's inputs.

    It is the layer's output h, or that of its MLP where the layer does not add it as it is.
    """
    if not adds_as_it_is(handle, layer):
        return attention_and_mlp_outputs(handle, events, layer)[1]
    rows = prompt_rows(handle, events, [""])
    hidden = suffix_from_layer(handle, rows.batch, layer + 1, layer + 1).hidden.to(handle.device)
    return hidden[torch.arange(len(events), device=handle.device), rows.at].float()


@torch.no_grad()
def attention_and_mlp_outputs(
    handle: ModelHandle, events: Sequence[EditEvent], layer: int
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """(n, d) float32 outputs of the layer's attention and of its MLP where each bare prompt's subject ends.

    Both lie on the device of the model's inputs.
    """
    rows = prompt_rows(handle, events, [""])
    suffix = suffix_from_layer(handle, rows.batch, layer, layer)
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, output: Any) -> None:
            kept[name] = (output[0] if isinstance(output, tuple) else output).reshape(*rows.batch.prompt.shape, -1).clone()

        return hook

    with handle.hooked(handle.attention(layer), keep("attention")), handle.hooked(handle.down(layer), keep("mlp")):
        suffix.layer(layer, suffix.hidden)
    each = torch.arange(len(events), device=rows.at.device)
    attention, mlp = (kept[name].to(each.device)[each, rows.at].float() for name in ("attention", "mlp"))
    return attention, mlp
