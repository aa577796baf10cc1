"""MEMOIR (Wang et al., NeurIPS 2025, arXiv 2506.07899): edits in sparse columns of a residual memory beside one down-projection.

With a(x) the input of the down-projection W_0 of one layer, abar its mean over the prompt, and c that mean over irrelevant prompts,

    S(x) = the k largest entries of abar(x) - c ,        M(x) = pi(S(x)) ,                            (1)
    FFN(x) = W_0 a + W_m (M * a) ,        W_m = 0 at first,                                           (2)

with pi a fixed random permutation of the f entries, so that frequent features do not fill the same columns. An edit trains the k
columns of W_m in its mask M_i, by plain gradient descent on its answer behind some contexts; columns outside stay as they are. A
prompt is answered with the mask of the edit that it overlaps most,

    R(x) = max_i |M(x) and M_i| / k ,        the memory acts with M_i where R(x) >= tau ,              (3)

and by the base model's own numbers elsewhere. The decision is made once, from the prompt, and kept for the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import EditBatch, EditEvent
from testbed.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveFraction, PositiveInt
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.base import Editor, EditorConfig, appended, need, require_finite_loss, require_same
from testbed.editors.codebook.gate import Gate, Hits
from testbed.editors.codebook.keys import read_keys
from testbed.editors.hyperparameters import GPT_J, LLAMA_2_7B, LLAMA_3_8B, MISTRAL_7B, SHALLOW, PublishedRow, Table, Values
from testbed.editors.locate.keys import ask_of, contexts_that_fit, draw_contexts
from testbed.editors.traits import Traits
from testbed.editors.work import Work, down_shape
from testbed.model.encoding import Batch
from testbed.model.handle import as_matrix, as_stored, project
from testbed.model.packed_linear import packed_layers
from testbed.model.predictor import ModelPredictor, Predictor
from testbed.model.prefix_cache import ImagePrefixes
from testbed.model.suffix import mean_over_prompt, suffix_from_down_projection

PUBLISHED: Table = {
    LLAMA_3_8B: PublishedRow("MEMOIR's repository, hparams/MEMOIR/llama3-8b.yaml", {"layer": 27, "steps": 30, "k": 4096, "tau": 0.4}),
    LLAMA_2_7B: PublishedRow("MEMOIR, section 5 and appendix", {"layer": 27, "k": 4096, "tau": 0.46}),
    MISTRAL_7B: PublishedRow("MEMOIR, section 5 and appendix", {"layer": 27, "k": 4096, "tau": 0.4}),
    GPT_J: PublishedRow("MEMOIR, section 5 and appendix", {"layer": 21, "k": 4096, "tau": 0.45}),
}
_WORD = 64
"""Bits of a mask in one int64."""


@dataclass(frozen=True)
class MemoirConfig(EditorConfig):
    """Fields that are None come from the hyper-parameters of the model."""

    layer: int | None = None
    """Decoder layer beside whose down-projection the memory lies; negative counts from the last (paper: 27 of 32)."""
    k: PositiveInt | None = None
    """k: columns of an edit (paper: 4,096 of 14,336)."""
    tau: PositiveFraction | None = None
    """tau: overlap from which the memory acts (paper: 0.4 to 0.46)."""
    lr: PositiveFloat | None = None
    """Step size of plain gradient descent (paper: 1)."""
    clip: PositiveFloat = 1.0
    """Longest gradient (Frobenius norm; paper: 1)."""
    steps: PositiveInt | None = None
    """Steps an edit, at most (paper: 70; Llama-3: 30)."""
    stop: NonNegativeFloat = 0.01
    """Loss (nats a token) under which an edit is learned (ours; 0 is all of the steps, as released)."""
    contexts: NonNegativeInt | None = None
    """Sampled sentences before the prompt, beside the bare prompt (paper: 10 of 10 tokens)."""
    irrelevant: NonNegativeInt = 100
    """Questions of the train pool over which c is the mean (paper: 100); 0 is c = 0."""
    permute: bool = True
    """pi is drawn from the seed; off, it is the identity (for ablations)."""


@EDITORS.register("memoir")
class Memoir(Editor):
    """The memory's columns, and the mask of each edit as a set of bits."""

    summary = "sparse columns of a residual memory, activated by the overlap of masks (MEMOIR)"
    traits = Traits(gated=True, uses=frozenset({"train_pool"}))
    Config = MemoirConfig
    published, defaults = PUBLISHED, {"lr": 1.0, "steps": 70, "contexts": 10, "tau": 0.4}

    def _derived(self) -> Values:
        """The published layer by its share of the depth, and the published share of columns.

        No contexts, and on deeper models Llama-3's 30 steps: ten contexts cost ten times as much (SmolLM2: 11 CPU seconds an edit
        without), and five development edits of CounterFact were learned without them. Their prompts hold examples and all overlap
        by 0.6 or more, so that tau is 0.7 (docs/results/smollm2-counterfact.yaml).
        """
        depth = self.handle.n_layers
        layer = min(depth - 1, round(depth * 27 / 32))
        deep = {} if depth < SHALLOW else {"steps": 30, "tau": 0.7}
        return {"layer": layer, "k": round(down_shape(self.handle, layer)[1] * 2 / 7), "contexts": 0, **deep}

    def work(self, batch: int) -> Work:
        """Each edit trains alone, so that its steps are not shared by the batch."""
        layer = self.handle.layer_index(self.hyper.layer)
        d, f = down_shape(self.handle, layer)
        rows = 1.0 + self.hyper.contexts
        return Work(
            forwards=1.0 + rows,
            steps=float(self.hyper.steps),
            rows=rows,
            layers=self.handle.n_layers - 0.5 - layer,
            trained_per_edit=float(d * self.hyper.k),
            state=float(d * f),
            state_per_edit=f / 32,
        )

    def _prepare(self, pool: TrainPool) -> None:
        self.layer = self.handle.layer_index(self.hyper.layer)
        self.module, self.weight_name = self.handle.down(self.layer), self.handle.down_weight(self.layer)
        self.weight = self.handle.parameter(self.weight_name).detach().float()
        self.d, self.f = as_matrix(self.module, self.weight).shape
        self.k = min(self.hyper.k, self.f)
        self._prefixes = ImagePrefixes(self.handle, self.module)
        asks = [q.ask() for q in pool.questions if self.handle.reads_pictures or q.image is None][: self.config.irrelevant]
        self.centre = read_keys(self._prefixes, asks, mean_over_prompt).mean(0) if asks else torch.zeros(self.f)
        if not asks and self.config.irrelevant:
            self.notes.append("the stream has no train pool: masks are the largest mean activations themselves, without a centre")
        order = torch.randperm(self.f, generator=self.generator(0)) if self.config.permute else torch.arange(self.f)
        self.order = order
        self.memory = torch.zeros(self.d, self.f, device=self.weight.device)
        self.contexts: list[str] = []
        self._take([], torch.zeros(0, -(-self.f // _WORD), dtype=torch.long, device=self.weight.device))

    def _take(self, edits: list[str], masks: Tensor) -> None:
        """Let the memory know these edits, each with its mask (N, words)."""
        self.edits, self.masks = edits, masks
        self._rows = masks

    def _columns(self, means: Tensor) -> Tensor:
        """(n, k) equation 1, for mean activations of prompts (n, f)."""
        largest = (means.float() - self.centre.to(means.device)).topk(self.k, dim=1).indices
        return self.order.to(means.device)[largest].sort(1).values

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        if not self.contexts:
            self.contexts = ["", *draw_contexts(self.handle, self.hyper.contexts, (10,), self.generator(0))]
        means = read_keys(self._prefixes, [e.ask() for e in batch.events], mean_over_prompt)
        columns = self._columns(means).to(self.memory.device)
        losses, steps = [], []
        with packed_layers(self.handle, self.layer + 1):
            for event, own in zip(batch.events, columns):
                loss, taken = self._train(event, own)
                losses.append(loss)
                steps.append(float(taken))
        masks = packed(columns, self.f)
        n = len(self.edits)
        self._rows = appended(self._rows, n, masks)
        self.edits, self.masks = [*self.edits, *(e.id for e in batch.events)], self._rows[: n + len(masks)]
        used = sum(losses) / len(losses)
        return {"loss": used, "steps": sum(steps) / len(steps), "entries": float(len(self.edits))}

    @timed("train")
    def _train(self, event: EditEvent, own: Tensor) -> tuple[float, int]:
        """Train the columns `own` (k,) of the memory on one edit: (the last loss, the steps). Raises `EditFailed`."""
        asks = [ask_of(event, c) for c in contexts_that_fit(self.handle, [event], self.contexts, self.notes)]
        suffix = suffix_from_down_projection(self.handle, asks, [event.target] * len(asks), self.layer)
        base, active = project(self.module, suffix.act, self.weight), suffix.act[..., own].float()
        columns, loss, step = self.memory[:, own], torch.nan, 0
        for step in range(self.hyper.steps + 1):
            columns = columns.detach().requires_grad_(True)
            losses = suffix.losses(lambda act, c=columns: base + (active @ c.mT).to(base.dtype)).mean()
            require_finite_loss(losses, self.hyper.lr)
            loss = float(losses.detach())
            if step == self.hyper.steps or loss < self.config.stop:
                break
            (gradient,) = torch.autograd.grad(losses, columns)
            shorter = (self.config.clip / gradient.norm().clamp(min=1e-30)).clamp(max=1)
            columns = columns - self.hyper.lr * shorter * gradient
        self.memory = self.memory.index_copy(1, own, columns.detach())
        return loss, step

    def predictor(self) -> Predictor:
        """The model with the memory as it is now; later edits do not change this predictor."""
        router = OverlapRouter(self.edits, self.masks, self.k, self.hyper.tau)
        stored, f, module = as_stored(self.module, self.memory), self.f, self.module

        def answer(hits: Hits) -> Tensor:
            mask = unpacked(router.masks[hits.rows], f).to(hits.act.device)
            return hits.out + project(module, hits.act * mask[:, None], stored, bias=False)

        gate = Gate(self.handle, [(self.module, answer)], router, self._queries)
        return ModelPredictor(self.handle, gate.around, gate.explain)

    def _queries(self, act: Tensor, batch: Batch) -> Tensor:
        """(B, words) the masks of prompts, from the layer's inputs (B, T, f)."""
        return packed(self._columns(mean_over_prompt(act, batch)), self.f)

    def _own(self) -> dict[str, Any]:
        return {"model": self.handle.hash, "layer": self.weight_name, "k": self.k}

    def _state(self) -> dict[str, Any]:
        tensors = {"memory": self.memory, "masks": self.masks, "centre": self.centre, "order": self.order}
        return {**tensors, "edits": list(self.edits), "contexts": self.contexts, **self._own()}

    def _load(self, state: dict[str, Any]) -> None:
        require_same(state, self._own())
        device = self.weight.device
        edits = list(state["edits"])
        self.memory = need(state, "memory", (self.d, self.f)).to(device)
        self.centre, self.order = need(state, "centre", (self.f,)).cpu(), need(state, "order", (self.f,)).cpu()
        self._take(edits, need(state, "masks", (len(edits), -(-self.f // _WORD))).to(device))
        self.contexts = list(state["contexts"])


class OverlapRouter:
    """Routes a prompt to the edit whose mask it overlaps most, if by a share tau at least; of equal ones the newest answers."""

    def __init__(self, edits: Sequence[str], masks: Tensor, k: int, tau: float) -> None:
        self.edits, self.masks, self.k, self.tau = edits, masks, k, tau

    def __len__(self) -> int:
        return len(self.edits)

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Equation 3 for masks (B, words): (B,) the edit's row or -1, and (B,) R, float64."""
        masks = self.masks.to(queries.device)
        overlap = torch.stack([common(query, masks) for query in queries]).double() / self.k
        newest = len(self.edits) - 1 - overlap.flip(1).argmax(1)
        largest = overlap.amax(1)
        return torch.where(largest >= self.tau, newest, -1), largest

    def entry_of(self, row: int) -> str:
        return self.edits[row]


def packed(columns: Tensor, f: int) -> Tensor:
    """(n, words) int64: the sets of columns (n, k) of f as bits."""
    words = -(-f // _WORD)
    bits = torch.zeros(len(columns), words * _WORD, dtype=torch.long, device=columns.device).scatter_(1, columns, 1)
    return (bits.reshape(-1, words, _WORD) << torch.arange(_WORD, device=columns.device)).sum(2)


def unpacked(masks: Tensor, f: int) -> Tensor:
    """(n, f) bool: the reverse of `packed`."""
    return ((masks[..., None] >> torch.arange(_WORD, device=masks.device)) & 1).bool().flatten(1)[:, :f]


def common(query: Tensor, masks: Tensor) -> Tensor:
    """(N,) how many columns a mask (words,) has in common with each of the masks (N, words): the bits of the ands, counted in parallel
    within each word (Warren, Hacker's Delight, section 5-1)."""
    x = query & masks
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56).sum(1)
