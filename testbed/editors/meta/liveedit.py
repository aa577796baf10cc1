"""LiveEdit (Chen et al., CVPR 2025, arXiv 2411.15432): a trained module makes a low-rank expert of each edit; a router mixes experts.

An edit is a picture, a question and a new answer. At one layer, with h the hidden states that leave it, its expert (U, V), r x d each,
is two cross-attentions of r learned queries over the h of picture, question and answer. The edit is not trained on. Two extractors of
one form read edits (^) and questions (-). With A(q; h) the cross-attention of q over h, and e learned queries E and F of width m,

    phi = A( A(E; h of the question); h of the picture )      what the question picks out of the picture        (1)
    psi = A( F; h of the question )                           what the question says                            (2)
    s(a, b) = mean over e of <a_e, b_e> / sqrt(m)                                                               (3)
    hard routing keeps the experts with   s(phi-, phi^) > s(phi-, phi0)                                         (4)
    soft routing weights them by          w = softmax(s(psi-, psi^)) sigmoid(s(psi-, psi^))                     (5)
    h <- h + sum over them  w V^T max(0, U LN(h))                                                               (6)

where the sentinel phi0 is equation 1 over learned states instead of a picture. Where no expert is left the model's own numbers stay.
The module is trained before the first edit, on edits that the stream does not have, by

    -log p(answer | edit) - log p(answer | rephrasing) + KL(before || after | another question) + routing       (7)

with the experts of a mini-batch, some of them at random, as the memory. Routing takes contrastive losses of equations 4 and 5.

The route of a prompt is decided once, from the prompt, and experts act at every position and at every new token. In the released code
a hook acts at the prefill alone, so that tokens generated with a cache are the unedited model's. A newer edit of the same fact takes the
place of the older one (published: both stay and are mixed). A prompt without a picture meets the experts of edits without one, and hard
routing is then s(psi-, psi^) > 0 (ours; published: no expert acts without a picture).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from streams.base import TrainEdit, TrainPool
from testbed.core.events import EditBatch, EditEvent
from testbed.core.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.base import BadEditor, EditFailed, Editor, need, require_same
from testbed.editors.codebook.gate import Gate, Hits
from testbed.editors.hyperparameters import ModelKey, PublishedRow, Table, Values
from testbed.editors.meta.examples import data_key, examples_of
from testbed.editors.meta.liveedit_network import ExpertNetwork, Experts, Features, RowMasks
from testbed.editors.meta.liveedit_training import LiveEditTask, rows_of
from testbed.editors.meta.training import MetaTrainingConfig, Plan, before_first_edit, cache_key, finished, trained
from testbed.editors.retrieval.fact_store import FactStore, Version
from testbed.editors.traits import Traits
from testbed.editors.work import Work
from testbed.model.encoding import Batch
from testbed.model.handle import ModelHandle
from testbed.model.predictor import ModelPredictor, Predictor

_DEPTH, _WIDTH, _HEADS = 21 / 32, 1024 / 2560, 8
"""Of BLIP-2: the layer as a share of the depth, and the width of features as one of the model's."""
_LEAST_WIDTH = 64
_BLIP2 = PublishedRow(
    "LiveEdit's repository, records/liveedit/blip2-opt-2.7b/EVQA/config.yaml; steps: 50 epochs over E-VQA",
    {"layer": 21, "width": 1024, "heads": _HEADS, "scale": 5.0, "lr": 1e-4, "train_steps": 39_650, "judge_every": 500},
)
PUBLISHED: Table = {ModelKey("opt", 32, 2560, vocabulary): _BLIP2 for vocabulary in (50272, 50304)}
"""BLIP-2 with OPT-2.7B, before and after its image token."""


@dataclass(frozen=True)
class LiveEditConfig(MetaTrainingConfig):
    """Fields that are None come from the hyper-parameters of the model."""

    train_batch: PositiveInt = 8
    """Train edits in one optimiser step (published: 8)."""
    layer: int | None = None
    """l_e, the decoder layer behind which experts act, not the last (published: 21 of 0 to 31)."""
    width: PositiveInt | None = None
    """m, width of features (published: 1024)."""
    heads: PositiveInt | None = None
    """Heads of each attention; they divide m and the model's width (published: 8)."""
    queries: PositiveInt = 4
    """e, vectors in a feature (published: 4)."""
    rank: PositiveInt = 4
    """r, rank of an expert (published: 4)."""
    scale: PositiveFloat | None = None
    """U and V are divided by this and the root of r when they are made (published: 5; on narrow models such experts change nothing that
    an answer shows, so that the training would first have to make them larger)."""
    sentinel: PositiveInt = 32
    """Learned states that stand for a picture of no edit (published: as many as a picture has token positions, 32 in BLIP-2)."""
    reliability: NonNegativeFloat = 1.0
    """Coefficient of the edit's loss in equation 7 (published: 1, as the following)."""
    generality: NonNegativeFloat = 1.0
    """Coefficient of the rephrasing's loss."""
    locality: NonNegativeFloat = 1.0
    """Coefficient of the divergence on another question."""
    soft_routing: NonNegativeFloat = 1.0
    """Coefficient of the routing losses by text."""
    hard_routing: NonNegativeFloat = 1.0
    """Coefficient of the routing losses by pictures."""
    lr: PositiveFloat | None = None
    """Adam's step size (published: 1e-4, a tenth of it from step 10,000 on, which is not done here)."""
    train_steps: PositiveInt | None = None
    """Optimiser steps at most (published: 50 epochs)."""
    judge_every: PositiveInt | None = None
    """Optimiser steps between two judgements on held-out train edits (published: 500 between two checkpoints)."""
    patience: PositiveInt = 20
    """Judgements in a row without a better one after which the training ends."""


def derived(handle: ModelHandle) -> Values:
    """For a model without published values: the same share of depth and of width, never the last layer."""
    heads = gcd(_HEADS, handle.width)
    width = max(_LEAST_WIDTH, heads * round(_WIDTH * handle.width / heads))
    return {"layer": max(0, min(handle.n_layers - 2, int(_DEPTH * handle.n_layers))), "width": width, "heads": heads}


class ExpertRouter:
    """Routes prompts to experts; the heaviest one of a prompt names the route. It never changes but for the weights of the last batch."""

    def __init__(self, network: ExpertNetwork, experts: Experts) -> None:
        self.network, self.experts = network, experts
        self.weights = torch.zeros(0)
        """(B, n) of the last batch that was routed."""

    def __len__(self) -> int:
        return len(self.experts)

    def read(self, states: Tensor, batch: Batch) -> Tensor:
        """(B, T, d) hidden states of prompts to (B, ..) features in one row each."""
        device = self.experts.u.device
        return self.network.features("ask", states.to(device), RowMasks.of(batch.on(device))).flat()

    def retrieve(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Features to (B,) the heaviest expert, -1 where none passed, and (B,) its weight."""
        self.weights, passed = self.network.route(self.experts, Features.of_flat(queries, self.experts.textual.shape[1]))
        weight, row = self.weights.max(1)
        return torch.where(passed.any(1), row, -1).cpu(), weight.cpu()

    def entry_of(self, row: int) -> str:
        return self.experts.ids[row]

    def answer(self, hits: Hits) -> Tensor:
        """(h, T, d) what leaves the layer, with the experts of each row added (equation 6)."""
        e, device = self.experts, self.experts.u.device
        weights = self.weights[hits.sources.to(device)]
        used = (weights > 0).any(0)
        added = self.network.added(hits.out.to(device), e.u[used], e.v[used], weights[:, used])
        return hits.out + added.to(hits.out)


class ExpertGate(Gate):
    """A gate behind a decoder layer, whose output it reads and adds to."""

    def __init__(self, handle: ModelHandle, layer: nn.Module, router: ExpertRouter) -> None:
        super().__init__(handle, [(layer, router.answer)], router, router.read)
        self.experts = router

    @contextmanager
    def around(self, batch: Batch) -> Iterator[None]:
        """Keep the gate in place for the length of one batch."""
        self.beams = 0
        if not (self.enabled and len(self.experts)):
            yield
            return
        with self.handle.hooked(self.answers[0][0], lambda m, args, output: self._changed(output, batch)):
            yield

    def _changed(self, output: Any, batch: Batch) -> Any:
        """The layer's output with experts added; None where no prompt has any."""
        hidden = output[0] if isinstance(output, tuple) else output
        new = self._call(hidden, hidden, batch, self.experts.answer)
        return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

    def explain(self, batch: Batch) -> list[dict[str, Any]]:
        """For each prompt the edit of the heaviest expert, or null, its weight, and how many experts act."""
        if not self.beams:
            return [{} for _ in batch.asks]
        counts = (self.experts.weights > 0).sum(1).tolist()
        return [
            {"entry": self.experts.entry_of(i) if i >= 0 else None, "weight": round(w, 4), "experts": n}
            for i, w, n in zip(self.row.tolist(), self.distance.tolist(), counts)
        ]


@EDITORS.register("liveedit")
class LiveEdit(Editor):
    """The store of facts says which edits hold; each version has its expert and features in the row of its number.

    State: the versions (`facts`), the withdrawn ones (`gone`), their experts (`expert.u` (n, r, d), ...), the module (`net.NAME`).
    """

    summary = "a trained module makes a low-rank expert of each edit, routed by picture, then by text (LiveEdit)"
    traits = Traits(gated=True, undo=True, uses=frozenset({"train_edits"}), learns="rule")
    Config = LiveEditConfig
    published, defaults = PUBLISHED, {"scale": 0.7, "lr": 2e-3, "train_steps": 2_000, "judge_every": 50}

    def _derived(self) -> Values:
        return derived(self.handle)

    def work(self, batch: int) -> Work:
        """One forward an edit, behind the training of the module."""
        h, m, d = self.hyper, self.hyper.width, self.handle.width
        numbers = float(6 * m * (m + 2 * d) + 2 * (m * m + m * d + d * d))
        # of each example the edit and its rephrasing, and the other question before and after
        layers = float(self.handle.n_layers - 1 - self.handle.layer_index(h.layer))
        before = before_first_edit(h, 3.0, layers, numbers, lambda pool: finished(self.name, self.handle, self._key(pool.edits)))
        return Work(before=before, forwards=1.0, state=numbers, state_per_edit=2.0 * (h.rank * d + h.queries * m))

    def _key(self, edits: Sequence[TrainEdit]) -> str:
        """What the training depends on."""
        return cache_key(self.handle, data_key(edits), asdict(self.hyper))

    def _prepare(self, pool: TrainPool) -> None:
        self.layer = self._checked_layer()
        network = ExpertNetwork.fresh(self.handle.width, self.hyper, self.handle.layer_device(self.layer))
        examples = examples_of(self.handle, pool.edits, self.config.held_out)
        task = LiveEditTask(self.handle, self.layer, network, examples, self.hyper)
        done = trained(task, Plan.of(self.name, self.hyper), self.handle, self._key(pool.edits))
        self.network = network.with_tensors(done.best)
        self.notes.append(f"meta-training on {examples.summary}: {done.note}")
        if not any(e.event.image is not None for e in examples.train):
            self.notes.append("the train edits have no pictures: experts are routed by text alone, which is this project's rule")
        self.store, self.experts = FactStore(), self._no_experts()

    def _checked_layer(self) -> int:
        """The layer behind which experts act. Raises `BadEditor` for the last, and for heads that do not divide the widths."""
        layer, h, d = self.handle.layer_index(self.hyper.layer), self.hyper, self.handle.width
        if layer + 1 == self.handle.n_layers:
            raise BadEditor(f"experts act on what leaves a layer below the last: layer must be 0 to {layer - 1}, got {h.layer}")
        if h.width % h.heads or d % h.heads:
            raise BadEditor(f"heads must divide the features' width {h.width} and the model's {d}, got {h.heads}")
        return layer

    def _no_experts(self) -> dict[str, Tensor]:
        h, d, device = self.hyper, self.handle.width, self.handle.layer_device(self.layer)
        pair, feature = (0, h.rank, d), (0, h.queries, h.width)
        shapes = {"u": pair, "v": pair, "visual": feature, "textual": feature, "pictured": (0,)}
        return {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        made = [self._expert(e) for e in batch.events]
        for event in batch.events:
            self.store.add(event, batch.step)
        self.experts = {name: torch.cat([t, *(m[name] for m in made)]) for name, t in self.experts.items()}
        return {"experts": float(self.store.alive().sum()), "versions": float(len(self.store.log))}

    @timed("generate")
    @torch.no_grad()
    def _expert(self, event: EditEvent) -> dict[str, Tensor]:
        """The expert of an edit and its features, (1, ..) each. An edit is run alone, so that it depends on no other."""
        rows = rows_of(self.handle, self.layer, [event.ask()], [event.target], self.experts["u"].device)
        u, v = self.network.experts(rows.states, rows.masks)
        own = self.network.features("edit", rows.states, rows.masks)
        made = {"u": u, "v": v, "visual": own.visual, "textual": own.textual, "pictured": own.pictured.float()}
        if not all(bool(torch.isfinite(t).all()) for t in made.values()):
            raise EditFailed("the hidden states of the edit are not finite, so that it has no expert")
        return made

    def predictor(self) -> Predictor:
        """The model with the experts that hold now; later edits do not change this predictor."""
        return self._with_experts(self.store.alive().tolist())

    def as_of(self, step: int) -> Predictor:
        """The edited model as it was after a past step."""
        return self._with_experts(self.store.alive(step).tolist())

    def _with_experts(self, alive: Sequence[bool]) -> Predictor:
        """The model with some versions' experts, in the order of their edits' ids, so that the order of edits changes no bit."""
        rows = sorted((i for i, holds in enumerate(alive) if holds), key=lambda i: self.store.log[i].event_id)
        at = {name: t[rows] for name, t in self.experts.items()}
        ids = tuple(self.store.log[i].event_id for i in rows)
        experts = Experts(ids, at["u"], at["v"], at["visual"], at["textual"], at["pictured"] > 0)
        gate = ExpertGate(self.handle, self.handle.layers[self.layer], ExpertRouter(self.network, experts))
        return ModelPredictor(self.handle, gate.around, gate.explain)

    def revert(self, event_ids: Iterable[str]) -> None:
        """Withdraw these edits, so that what they superseded holds again. Raises `BadEditor` for an unknown id."""
        step = max(self.step, *(v.since for v in self.store.log), 0)
        for i in event_ids:
            try:
                self.store.withdraw(i, step)
            except KeyError as e:
                raise BadEditor(f"cannot undo {i}: it is not a live edit") from e

    def _own(self) -> dict[str, Any]:
        return {"model": self.handle.hash, "layer": self.layer}

    def _state(self) -> dict[str, Any]:
        learned = {f"net.{n}": t.detach() for n, t in self.network.tensors.items()}
        experts = {f"expert.{n}": t for n, t in self.experts.items()}
        return {**learned, **experts, "facts": list(self.store.log), "gone": dict(self.store.gone), **self._own()}

    def _load(self, state: dict[str, Any]) -> None:
        require_same(state, self._own())
        store = FactStore((Version(*row) for row in state["facts"]), {int(k): v for k, v in state["gone"].items()})
        learned = {n: need(state, f"net.{n}", tuple(t.shape)).to(t.device) for n, t in self.network.tensors.items()}
        n = len(store.log)
        self.experts = {k: need(state, f"expert.{k}", (n, *t.shape[1:])).to(t.device) for k, t in self.experts.items()}
        self.store, self.network = store, self.network.with_tensors(learned)
