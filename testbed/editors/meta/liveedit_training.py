"""The training of LiveEdit's module (equation 7 in `liveedit.py`) on train edits, of which a mini-batch is a small memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from testbed.core.events import Ask
from testbed.editors.meta.examples import MetaExample, MetaExamples, drawn, example, generator_of
from testbed.editors.meta.liveedit_network import ExpertNetwork, Features, RowMasks, own_similarity, passing, similarity, soft_weights
from testbed.model.answer_loss import answer_nll
from testbed.model.encoding import Batch, answer_ids, collate
from testbed.model.handle import ModelHandle
from testbed.model.layout import layout_verified, verify_layout
from testbed.model.suffix import ModelSuffix, mean_by_row, suffix_from_layer

_KIND = "behind a layer"
_EPSILON = 1e-8
"""Added to probabilities before their logarithm, as in the released code."""


@dataclass(frozen=True)
class LayerOutputRows:
    """Prompts with their answers, run up to behind the layer; states: (B, T, d) what leaves it, float32, on the network's device."""

    suffix: ModelSuffix
    states: Tensor
    masks: RowMasks

    @property
    def batch(self) -> Batch:
        return self.suffix.batch

    def log_probabilities(self, added: Tensor | None) -> Tensor:
        """(n, V) float32 where answers' tokens are predicted, with (B, T, d) added to what leaves the layer."""
        return self.suffix.handle.logits(self._final(added)).float().log_softmax(-1)

    def nats(self, added: Tensor) -> Tensor:
        """(B,) mean cross-entropy (nats a token) of each row's answer, its end token included."""
        return self.mean(answer_nll(self.suffix.handle, self._final(added), self.batch.answer_ids))

    def _final(self, added: Tensor | None) -> Tensor:
        hidden = self.suffix.hidden
        return self.suffix.final_hidden(self.suffix.run(hidden if added is None else hidden + added.to(hidden)))

    def mean(self, values: Tensor) -> Tensor:
        """(B,) mean over each row's answer tokens of values (n,)."""
        return mean_by_row(values, self.batch.before_answer.nonzero()[:, 0].to(values.device), len(self.batch.answer))


@torch.no_grad()
def rows_of(handle: ModelHandle, layer: int, asks: Sequence[Ask], answers: Sequence[str], device: torch.device) -> LayerOutputRows:
    """Run prompts with their answers and end tokens up to behind a layer; "" asks for the distribution behind the prompt alone.

    Raises `UntokenizableAnswer`, `PromptTooLong`, and, once a model, `UnknownLayout` where its logits are not those of its last norm.
    """
    ids = [answer_ids(handle, a, x) if x else [] for a, x in zip(asks, answers)]
    batch = collate(handle, list(asks), ids, end=True)
    if not layout_verified(handle, layer + 1, _KIND):
        verify_layout(handle, layer + 1, batch, lambda weight: _logits(handle, layer, batch, weight), _KIND)
    suffix = suffix_from_layer(handle, batch, layer + 1)
    return LayerOutputRows(suffix, suffix.hidden.float().to(device), RowMasks.of(batch.on(device)))


def _logits(handle: ModelHandle, layer: int, batch: Batch, weight: Tensor) -> Tensor:
    with handle.swapped({handle.down_weight(layer + 1): weight}):
        suffix = suffix_from_layer(handle, batch, layer + 1)
        return handle.logits(suffix.final_hidden(suffix.run(suffix.hidden)))


@dataclass(frozen=True)
class DrawnEdits:
    """A mini-batch of n edits as it was run, with its experts.

    asked: 2 n rows, the edits and then their rephrasings, with the new answer. beside: n rows, the questions that must stay.
    same, alike: (3 n, 3 n) bool over edits, rephrasings and questions beside, whether two rows are about one question, and whether they are
    or the pictures alone tell them apart.
    """

    asked: LayerOutputRows
    beside: LayerOutputRows
    u: Tensor
    v: Tensor
    questions: Features
    """Of all 3 n rows on the side of questions."""
    edits: Features
    """Of all 3 n rows on the side of edits."""
    same: Tensor
    alike: Tensor

    @property
    def n(self) -> int:
        return len(self.u)


class LiveEditTask:
    """What `training.trained` trains; `network` holds the tensors."""

    def __init__(self, handle: ModelHandle, layer: int, network: ExpertNetwork, examples: MetaExamples, h: Any) -> None:
        self.handle, self.layer, self.network, self.examples, self.h = handle, layer, network, examples, h
        self.tensors: Mapping[str, Tensor] = network.tensors
        self.fixed: Mapping[str, Tensor] = {}
        self.device = network.tensors["sentinel"].device

    def begin(self) -> None:
        """Nothing beside the tensors is computed."""

    def rate(self, name: str) -> float:
        return self.h.lr

    def loss(self, generator: torch.Generator) -> Tensor:
        """Equation 7 of one mini-batch."""
        run = self.run(drawn(self.examples.train, self.h.train_batch, generator))
        return self._weighted(self.losses(run, generator))

    def _weighted(self, losses: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([getattr(self.h, name) * loss for name, loss in losses.items()]).sum()

    def run(self, batch: Sequence[MetaExample]) -> DrawnEdits:
        """Run the prompts of a mini-batch, generate its experts and read its features."""
        n, edits, rephrasings, beside = len(batch), *zip(*((e.edit, e.rephrasing, e.locality) for e in batch))
        answers = [e.answer for e in batch]
        asked = rows_of(self.handle, self.layer, [*edits, *rephrasings], answers * 2, self.device)
        stays = rows_of(self.handle, self.layer, beside, [e.kept for e in batch], self.device)
        u, v = self.network.experts(asked.states[:n], asked.masks.first(n))
        questions, own = (
            Features.joined(*(self.network.features(side, r.states, r.masks) for r in (asked, stays))) for side in ("ask", "edit")
        )
        keys = [_key(a) for a in (*edits, *edits, *beside)]
        same = torch.tensor([[a == b for b in keys] for a in keys], device=self.device)
        alike = torch.tensor([[a == b or (a[0] == b[0] and bool(a[1] and b[1])) for b in keys] for a in keys], device=self.device)
        return DrawnEdits(asked, stays, u, v, questions, own, same, alike)

    def losses(self, run: DrawnEdits, generator: torch.Generator) -> dict[str, Tensor]:
        """The parts of equation 7 by the name of their coefficient, numbers. The generator draws which experts a row is given."""
        given = self._given(run, generator)
        textual = similarity(run.questions.textual, run.edits.textual[: run.n])
        added = self._added(run, soft_weights(textual, given))
        nats = run.asked.nats(added[0]).to(self.device)
        rows = self._paired(run, generator)
        return {
            "reliability": nats[: run.n].mean(),
            "generality": nats[run.n :].mean(),
            "locality": self._divergence(run.beside, added[1]).to(self.device),
            "soft_routing": self._soft_routing(run, rows),
            "hard_routing": self._hard_routing(run, rows),
        }

    def _added(self, run: DrawnEdits, weights: Tensor) -> tuple[Tensor, Tensor]:
        """What the experts with weights (3 n, n) add to the rows that are asked and to those beside."""
        parts = weights.split([2 * run.n, run.n])
        one, two = (self.network.added(rows.states, run.u, run.v, w) for rows, w in zip((run.asked, run.beside), parts))
        return one, two

    def _given(self, run: DrawnEdits, generator: torch.Generator) -> Tensor:
        """(3 n, n) bool, the experts that each row is given: its own, for a row that is asked, and the first few of the mini-batch.

        Never among them is one of the same question, or of one that pictures alone tell apart: hard routing keeps that from the row.
        """
        few = torch.randint(run.n + 1, (3 * run.n, 1), generator=generator)
        given = torch.arange(run.n) < few
        given = given.to(self.device) & ~run.alike[:, : run.n]
        own = torch.eye(run.n, dtype=torch.bool, device=self.device)
        given[: 2 * run.n] |= own.repeat(2, 1)
        return given

    def _divergence(self, rows: LayerOutputRows, added: Tensor) -> Tensor:
        """The mean over rows of KL(before || after) where their answers are predicted, nats."""
        with torch.no_grad():
            before = rows.log_probabilities(None)
        after = rows.log_probabilities(added)
        return rows.mean((before.exp() * (before - after)).sum(-1)).mean()

    def _paired(self, run: DrawnEdits, generator: torch.Generator) -> Tensor:
        """(2 n,) the rows that routing is trained on as questions: of each edit itself or its rephrasing, and all beside."""
        edit = torch.arange(run.n) + run.n * torch.randint(2, (run.n,), generator=generator)
        return torch.cat([edit, torch.arange(2 * run.n, 3 * run.n)]).to(self.device)

    def _columns(self, run: DrawnEdits) -> tuple[Tensor, Tensor]:
        """(the rows of `edits` that routing is trained on, (2 n, 2 n) bool where a pair is a row with its own edit)."""
        columns = torch.cat([torch.arange(run.n), torch.arange(2 * run.n, 3 * run.n)]).to(self.device)
        return columns, torch.eye(2 * run.n, dtype=torch.bool, device=self.device)

    def _soft_routing(self, run: DrawnEdits, rows: Tensor) -> Tensor:
        """A row's own edit is the likeliest among others and lies over a half, others under it; half of that weight is on its neighbour.

        Pairs that pictures alone tell apart count in neither: text that is taught to tell them learns the pictures of the train edits.
        """
        columns, own = self._columns(run)
        other = ~run.alike[columns][:, columns]
        s = similarity(run.questions.textual[rows], run.edits.textual[columns])
        relative = -s.masked_fill(~(own | other), torch.finfo(s.dtype).min).log_softmax(1).diagonal().mean()
        right, wrong = (s.sigmoid() + _EPSILON).log(), ((-s).sigmoid() + _EPSILON).log()
        beside = other & own.roll(run.n, 1)
        return relative - right.diagonal().mean() - sum(wrong[at].mean() for at in (other, beside) if at.any())

    def _hard_routing(self, run: DrawnEdits, rows: Tensor) -> Tensor:
        """By pictures a row's own edit is nearer than others and the sentinel; without its own edit the sentinel is nearest."""
        columns, own = self._columns(run)
        other = ~run.same[columns][:, columns]
        asked, edits = run.questions[rows], run.edits[columns]
        both = asked.pictured[:, None] & edits.pictured[None]
        if not both.diagonal().any():
            return run.u.new_zeros(())
        s, least = similarity(asked.visual, edits.visual), own_similarity(asked.visual, asked.sentinel)[:, None]
        lowest = torch.finfo(s.dtype).min
        found, missed = (torch.cat([s.masked_fill(~(at & both), lowest), least], 1).log_softmax(1) for at in (own | other, other))
        kept = both.diagonal()
        return -found[:, :-1].diagonal()[kept].mean() - missed[kept, -1].mean()

    def judge(self) -> dict[str, float]:
        """Equation 7 on the held-out edits, with the same draws each time, and shares of them under the routing of a stream: rephrasings
        that are right to the last token, rephrasings that their own expert reaches, and questions beside that no expert does."""
        generator, held, size = generator_of(self.h.train_seed, 0), self.examples.held_out, self.h.train_batch
        found: list[dict[str, Tensor]] = []
        with torch.no_grad():
            for at in range(0, len(held), size):
                run = self.run([example(e, held, generator) for e in held[at : at + size]])
                losses = self.losses(run, generator)
                found.append({"loss": self._weighted(losses), "nats": losses["generality"], **self._routed(run)})
        return {name: torch.stack([f[name].float() for f in found]).mean().item() for name in found[0]}

    def _routed(self, run: DrawnEdits) -> dict[str, Tensor]:
        n, edits = run.n, run.edits[: run.n]
        textual, visual = (similarity(getattr(run.questions, k), getattr(edits, k)) for k in ("textual", "visual"))
        repeated = run.same[:, :n] & ~torch.eye(n, dtype=torch.bool, device=self.device).repeat(3, 1)
        passed = passing(run.questions, visual, textual, edits.pictured) & ~repeated
        log_p = run.asked.log_probabilities(self._added(run, soft_weights(textual, passed))[0])
        right = run.asked.mean((log_p.argmax(-1) == run.asked.batch.answer_ids.to(log_p.device)).float())
        return {
            "right": (right[n:] == 1).float().mean().to(self.device),
            "reached": passed[n : 2 * n].diagonal().float().mean(),
            "spared": 1 - passed[2 * n :].any(1).float().mean(),
        }


def _key(ask: Ask) -> tuple[str, str]:
    """What a question is known by: its text and its picture."""
    return ask.prompt, ask.image.key if ask.image is not None else ""
