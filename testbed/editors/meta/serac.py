"""SERAC (Mitchell et al., ICML 2022, arXiv 2206.06520): a memory of edits, a scope classifier, and a counterfactual model.

    answer(x) = h(z*, x) where s(z*, x) > 0.5, else the model's own,   z* = argmax s(z, x) over the stored edits     (2)

with s of equation 1 in `scope.py`. Both parts are trained before the first edit, on edits that the stream does not have: the
classifier by the binary cross-entropy of questions in scope (rephrasings) and out of it (neighbours, siblings, other edits), and
h by the cross-entropy of the new answer to a rephrasing.

h is the model itself with a low-rank addition, and reads the edit before the question; the paper takes a smaller model of its own
(T5-small). So both share a vocabulary, and the addition, which begins at zero, learns to follow the stated edit. The decision is
made once a prompt, for scores and generations alike; of equal edits the newest answers; an edit of the same fact supersedes the
one before it. `scope=text` (MMEdit's) looks at texts alone, `scope=image` at the picture too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from streams.base import TrainEdit, TrainPool
from testbed.core.events import Ask
from testbed.core.ranges import PositiveFloat, PositiveInt
from testbed.core.registry import EDITORS
from testbed.editors.adapters.lowrank import Adapter, TargetModule, check_rank, delta, find_target_modules, fresh
from testbed.editors.base import need
from testbed.editors.meta.examples import MetaExample, MetaExamples, data_key, drawn, example, examples_of, generator_of
from testbed.editors.meta.gradients import hooked_forward
from testbed.editors.meta.scope import ScopeClassifier
from testbed.editors.meta.training import MetaTrainingConfig, Plan, before_first_edit, cache_key, finished, trained
from testbed.editors.retrieval import prompts
from testbed.editors.retrieval.fact_editor import ContextPredictor, FactEditor, FactEditorConfig, PromptedAsk
from testbed.editors.retrieval.retriever import Retriever
from testbed.editors.traits import Traits
from testbed.editors.work import Work
from testbed.model.handle import ModelHandle
from testbed.model.predictor import ModelPredictor, Predictor

_IN_SCOPE = 0.5


@dataclass(frozen=True)
class SeracConfig(FactEditorConfig, MetaTrainingConfig):
    """Published values are those of the paper's section 4; the store's own encoder and similarity of pictures decide nothing here."""

    encoder: str = "bm25"
    other_pictures: float = 0.0
    scope: Literal["text", "image"] = "text"
    """What the classifier reads (published: the text)."""
    width: PositiveInt = 64
    """Numbers in the features of a text (published: DistilBERT's 768)."""
    modules: str | None = None
    """Regular expression over the names of the linear maps with an addition; by default all of the last half of the layers."""
    rank: PositiveInt = 8
    """Rank of the addition."""
    lr: PositiveFloat = 1e-3
    """Adam's step size (published: 1e-5, of pretrained models)."""
    train_steps: PositiveInt = 1_500
    """Optimiser steps at most."""
    judge_every: PositiveInt = 50
    """Optimiser steps between two judgements on held-out train edits."""
    patience: PositiveInt = 10
    """Judgements in a row without a better one after which the training ends."""


class SeracTask:
    """Trains classifier (`scope.NAME`) and addition (`u.i`, `v.i`) together; neither reads the other's tensors."""

    def __init__(
        self, handle: ModelHandle, targets: Sequence[TargetModule], scope: ScopeClassifier, examples: MetaExamples, h: SeracConfig
    ) -> None:
        self.handle, self.targets, self.scope, self.examples, self.h = handle, targets, scope, examples, h
        pairs = [fresh(t, h.rank, generator_of(h.train_seed, i)) for i, t in enumerate(targets)]
        self.adapters = [Adapter(u.requires_grad_(True), v.requires_grad_(True)) for u, v in pairs]
        own = {f"{n}.{i}": getattr(a, n) for i, a in enumerate(self.adapters) for n in "uv"}
        self.tensors: Mapping[str, Tensor] = {**{f"scope.{n}": t for n, t in scope.tensors.items()}, **own}
        self.fixed: Mapping[str, Tensor] = {}

    def begin(self) -> None:
        """Nothing beside the tensors is computed."""

    def rate(self, name: str) -> float:
        return 10 * self.h.lr if name.startswith("scope.") else self.h.lr

    def loss(self, generator: torch.Generator) -> Tensor:
        batch = drawn(self.examples.train, self.h.train_batch, generator)
        return self._scoped(batch)[0] + self._answered(batch).mean()

    def _scoped(self, batch: Sequence[MetaExample]) -> tuple[Tensor, Tensor]:
        return self.scope.loss([e.edit for e in batch], [e.rephrasing for e in batch], [e.locality for e in batch])

    def _answered(self, batch: Sequence[MetaExample]) -> Tensor:
        """(B,) nats a token of the new answers, with each edit before a rephrasing of its question."""
        template = prompts.TEMPLATES[self.h.wording]
        asks = [_stated(e.rephrasing, prompts.statement(e.edit.prompt, e.answer), template) for e in batch]
        return hooked_forward(self.handle, self.targets, asks, [e.answer for e in batch]).losses(self.adapters)

    def judge(self) -> dict[str, float]:
        """Both losses on the held-out edits, with the same draws each time, and the share of pairs that the classifier tells right."""
        generator, held, size = generator_of(self.h.train_seed, 0), self.examples.held_out, self.h.train_batch
        numbers: list[Tensor] = []
        with torch.no_grad():
            for at in range(0, len(held), size):
                batch = [example(e, held, generator) for e in held[at : at + size]]
                loss, told = self._scoped(batch)
                numbers.append(torch.stack([loss, self._answered(batch).mean().to(loss), told]))
        scoped, answered, told = torch.stack(numbers).mean(0).tolist()
        return {"loss": scoped + answered, "scope_right": told, "nats": answered}


def _stated(ask: Ask, statement: str, template: prompts.PromptTemplate) -> Ask:
    """The question with one stated edit before it."""
    return replace(ask, prompt=prompts.in_context([statement], ask.prompt, template))


@EDITORS.register("serac")
class Serac(FactEditor):
    """The fact store of the retrieval editors as the memory, the trained classifier, and the weights of the counterfactual model.

    State: as `FactEditor`, the classifier's tensors (`scope.NAME`) and the addition (`u.i`, `v.i`).
    """

    summary = "stores edits; a trained scope classifier lets a counterfactual model answer (SERAC)"
    traits = Traits(gated=True, undo=True, uses=frozenset({"train_edits"}), learns="context")
    Config = SeracConfig
    config: SeracConfig

    def work(self, batch: int) -> Work:
        """One edit before a question, which the model reads twice at most, behind the training of both parts."""
        targets = find_target_modules(self.handle, self.config.modules or self._upper_half())
        numbers = float(self.config.rank * sum(t.d + t.f for t in targets))
        # an example is a question behind its edit, about as long as two rows
        layers = float(self.handle.n_layers - targets[0].layer)
        before = before_first_edit(self.config, 2.0, layers, numbers, lambda pool: finished(self.name, self.handle, self._key(pool.edits)))
        return Work(before=before, forwards=0.0, asked=2.0, facts=1.0)

    def _key(self, edits: Sequence[TrainEdit]) -> str:
        """What the training depends on."""
        return cache_key(self.handle, data_key(edits), asdict(self.config))

    def _prepare(self, pool: TrainPool) -> None:
        super()._prepare(pool)
        self.targets = find_target_modules(self.handle, self.config.modules or self._upper_half())
        check_rank(self.targets, self.config.rank)
        scope = ScopeClassifier.fresh(self.handle, self.config.width, self.config.scope == "image", self.config.train_seed)
        examples = examples_of(self.handle, pool.edits, self.config.held_out)
        task = SeracTask(self.handle, self.targets, scope, examples, self.config)
        done = trained(task, Plan.of(self.name, self.config), self.handle, self._key(pool.edits))
        self._take(done.best)
        self.notes.append(f"meta-training on {examples.summary}: {done.note}")

    def _upper_half(self) -> str:
        """The names of the down-projections of the last half of the layers, as a regular expression."""
        names = [self.handle.down_weight(i).removesuffix(".weight") for i in range(self.handle.n_layers // 2, self.handle.n_layers)]
        return "^(" + "|".join(n.replace(".", r"\.") for n in names) + ")$"

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        """Use these trained tensors."""
        self.learned = dict(tensors)
        own = {n.removeprefix("scope."): t for n, t in tensors.items() if n.startswith("scope.")}
        self.scope = ScopeClassifier(self.handle, own, self.config.scope == "image")
        changes = [delta(t, Adapter(tensors[f"u.{i}"], tensors[f"v.{i}"])) for i, t in enumerate(self.targets)]
        self.counterfactual = {t.weight: self.handle.parameter(t.weight).float() + c for t, c in zip(self.targets, changes)}

    def predictor(self) -> Predictor:
        return SeracPredictor(self.retriever(), self.config, self.scope, self.counterfactual)

    def as_of(self, step: int) -> Predictor:
        """The edited model as it was after a past step."""
        return SeracPredictor(self.retriever(step), self.config, self.scope, self.counterfactual)

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), **self.learned}

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self._take({n: need(state, n, tuple(t.shape)).to(t.device) for n, t in self.learned.items()})

    def state_bytes(self) -> int:
        """The memory, the classifier and the addition."""
        return super().state_bytes() + sum(t.numel() * t.element_size() for t in self.learned.values())


class SeracPredictor(ContextPredictor):
    """Asks the counterfactual model where a stored edit has the question in its scope, else the unedited model."""

    def __init__(self, retriever: Retriever, config: SeracConfig, scope: ScopeClassifier, counterfactual: Mapping[str, Tensor]) -> None:
        super().__init__(retriever, config)
        self.reader, self.scope = ModelPredictor(self.handle, weights=counterfactual), scope
        rows = retriever.image_rows.tolist()
        pictures = dict(zip(rows, torch.from_numpy(retriever.image_embeddings.first(len(rows)))))
        live = [i for i, alive in enumerate(retriever.alive) if alive]
        self.facts = [retriever.log[i] for i in live]
        with torch.no_grad():
            self.edits = scope.of([f.prompt for f in self.facts], [pictures.get(i) for i in live]) if live else torch.zeros(0)

    def add_facts(self, asks: Sequence[Ask], answer_tokens: int) -> list[PromptedAsk]:
        return [self._decided(a, answer_tokens) for a in asks]

    def _decided(self, ask: Ask, answer_tokens: int) -> PromptedAsk:
        """Equation 2 for one question: the edit before it where that is in scope and fits into the window."""
        if not self.facts:
            return PromptedAsk(ask, {"retrieved": [], "similarity": [], "used": []})
        best, s = self.scope.nearest(self.edits, ask)
        fact = self.facts[best]
        prompted, dropped = ask, 0
        if s > _IN_SCOPE:
            stated = [fact.statement]
            prompted, dropped = self.fit(ask, answer_tokens, 1, lambda n: prompts.in_context(stated[:n], ask.prompt, self.template))
        hit = prompted is not ask
        added = self.tokens(prompted) - self.tokens(ask) if hit else 0
        notes = {"retrieved": [fact.event_id], "similarity": [round(s, 4)], "used": [fact.event_id] * hit}
        return PromptedAsk(prompted, {**notes, "added_tokens": added, "dropped": dropped})
