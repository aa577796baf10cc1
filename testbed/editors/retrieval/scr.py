"""SCR, selective contextual reasoning (He, Song and Sun 2025, arXiv 2503.05212): no weight changes, facts in the prompt.

The paper's three steps for a question x and a store F of facts, with the function that does each:

1. Semantic filtering: the k facts of F that are nearest to x by the similarity of an encoder (`Retriever.nearest`).
2. Confirmation: the same model names the one fact among them that answers x, or says that none does (`confirmed`).
3. Contextual reasoning: the model answers x with the confirmed fact before it, or x alone (`prompts.in_context`).

The setting `gate` replaces step 2, so that a run shows what each step contributes: `oracle-context` gives the right
fact, `topk` passes every retrieved fact, `threshold` compares the similarity with a calibrated bound, `model` is the
published confirmation by generation, and `index` compares the probabilities of the replies in one forward pass.

Two options have the form of CARML (NeurIPS 2025, OpenReview hdJXzKZjY9) and are off by default: `channels` fuses several similarities
for questions with a picture (`channels.py`), and `boost` raises the logits of the confirmed fact's answer (`boost.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch
from testbed.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from testbed.core.registry import EDITORS
from testbed.editors.base import BadEditor, Traits
from testbed.editors.retrieval import prompts
from testbed.editors.retrieval.boost import AnswerBoost
from testbed.editors.retrieval.channels import JOINT, fusion_of, named_channels
from testbed.editors.retrieval.fact_editor import ContextPredictor, FactEditor, FactEditorConfig, PromptedAsk, retrieval_log
from testbed.editors.retrieval.fact_store import FactStore, Version
from testbed.editors.retrieval.retriever import Retrieved, Retriever
from testbed.model.encoding import answer_ids
from testbed.model.predictor import ModelPredictor, Predictor

_POOL = 256
"""Unedited questions of each kind, with and without a picture, that calibrate a threshold."""
GATE_TOKENS = 16
"""Longest reply to the confirmation request, in tokens."""


@dataclass(frozen=True)
class ScrConfig(FactEditorConfig):
    k: NonNegativeInt = 0
    """Facts retrieved; 0: as many as the prompt template is made for, 5 as published, but 4 in the template of the tiny model."""
    gate: str = "model"
    """How a fact is accepted for a question: oracle-context, topk, threshold, model (published) or index."""
    threshold: float = 0.0
    """Least similarity for gate=threshold; 0: calibrated on unedited questions of the train pool."""
    false_accept: float = 0.05
    """Share of the unedited questions that the calibrated threshold accepts a fact for."""
    channels: str = JOINT
    """Similarities for questions with a picture, of visual, textual and joint, joined by +; several are fused as CARML does."""
    candidates: PositiveInt = 15
    """Facts that each of several channels proposes (CARML: 15)."""
    boost: NonNegativeFloat = 0.0
    """What is added to the logits of the accepted fact's answer (CARML: 6); 0 leaves the answer to the model."""

    def problems(self) -> list[str]:
        out = super().problems()
        if self.gate not in GATES:
            out.append(f"gate must be one of {', '.join(GATES)}, got {self.gate!r}")
        if not 0 < self.false_accept < 1:
            out.append(f"false_accept must be more than 0 and less than 1, got {self.false_accept}")
        try:
            named_channels(self.channels)
        except ValueError as e:
            out.append(str(e))
        return out


@EDITORS.register("scr")
class Scr(FactEditor):
    """Keeps facts beside the model and asks a question together with the fact that the gate accepts for it.

    State: as `FactEditor`, and the two thresholds (without and with a picture) with the number of facts at calibration.
    """

    summary = "retrieves facts, lets the model confirm which bears, and puts it into the prompt (SCR)"
    traits = Traits(gated=True, undo=True, uses=frozenset({"train_pool"}), learns="context")
    Config = ScrConfig
    config: ScrConfig

    def __init__(self, config: Any = None, seed: int = 0) -> None:
        super().__init__(config, seed)
        if self.config.gate == "oracle-context":
            self.traits = replace(self.traits, told_truth=True)  # pyright: ignore[reportAttributeAccessIssue]

    def _prepare(self, pool: TrainPool) -> None:
        if self.traits.told_truth:
            self.notes.append("gate=oracle-context is told which edit a question is about, so its score is an upper bound")
        super()._prepare(pool)
        asks = [q.ask() for q in pool.questions]
        self._unedited = [[a for a in asks if (a.image is not None) == pictured][:_POOL] for pictured in (False, True)]
        self.threshold = [self.config.threshold] * 2
        self.calibrated = 0
        if self.config.gate == "threshold":
            self.notes.append("a similarity threshold stands in for the model's confirmation (gate=threshold)")
            if not self.config.threshold and not any(self._unedited):
                raise BadEditor("the stream has no train pool to calibrate gate=threshold on: give --set scr.threshold=0.6 or the like")
        if self.config.boost:
            self.notes.append(f"boost={self.config.boost:g} raises the logits of the stored answer: the answer is not the model's own")
        template = prompts.TEMPLATES[self.config.wording]
        k = self.config.k or template.max_facts
        self.fusion = fusion_of(self.config.channels, self.config.candidates, k)
        self.notes.append(f"{k} facts retrieved; prompt template {self.config.wording!r}: {template.select!r}, {template.context!r}")

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        """Store the facts; calibrate the thresholds anew whenever the number of facts has doubled."""
        notes = super()._edit(batch)
        live = int(notes["facts"])
        if self.config.gate == "threshold" and not self.config.threshold and live >= 2 * self.calibrated:
            self.threshold, self.calibrated = [self._calibrated_threshold(asks) for asks in self._unedited], live
        return notes

    def _calibrated_threshold(self, asks: list[Ask]) -> float:
        """A similarity that the nearest facts of the share `false_accept` of these questions reach; 1 where there are no questions."""
        similarities = [retrieved[0].similarity if retrieved else 0.0 for retrieved in self.retriever().nearest(asks, 1)]
        return float(np.quantile(similarities, 1 - self.config.false_accept, method="higher")) + 1e-6 if similarities else 1.0

    def retriever(self, step: int | None = None) -> Retriever:
        """Retrieval with the channels that are set."""
        return replace(super().retriever(step), fusion=self.fusion)

    def predictor(self) -> Predictor:
        return ScrPredictor(self.retriever(), self.config, self.store, self.threshold)

    def as_of(self, step: int) -> Predictor:
        """The edited model as it was after a past step, but with the thresholds of now."""
        return ScrPredictor(self.retriever(step), self.config, self.store, self.threshold)

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), "threshold": self.threshold, "calibrated": self.calibrated}

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self.threshold, self.calibrated = list(state["threshold"]), state["calibrated"]


class ScrPredictor(ContextPredictor):
    """Retrieves facts for each question, lets the gate accept some of them, and asks the question with these before it."""

    config: ScrConfig

    def __init__(self, retriever: Retriever, config: ScrConfig, store: FactStore, threshold: Sequence[float]) -> None:
        super().__init__(retriever, config)
        self.store, self.threshold = store, threshold
        self.boost = AnswerBoost(self.handle, config.boost) if config.boost else None
        if self.boost is not None:
            self.reader = ModelPredictor(self.handle, self.boost.around)

    def add_facts(self, asks: Sequence[Ask], answer_tokens: int) -> list[PromptedAsk]:
        retrieved = self.retriever.nearest(asks, self.config.k or self.template.max_facts)
        accepted = GATES[self.config.gate](self, asks, retrieved)
        logs = [{**retrieval_log(facts), **notes} for facts, (_, notes) in zip(retrieved, accepted)]
        return [self._prompted(a, answer_tokens, facts, log) for a, (facts, _), log in zip(asks, accepted, logs)]

    def _prompted(self, ask: Ask, answer_tokens: int, facts: list[Version], log: dict[str, Any]) -> PromptedAsk:
        prompted, used = self.fit_facts(ask, answer_tokens, facts, prompts.in_context)
        added = self.tokens(prompted) - self.tokens(ask) if used else 0
        if self.boost is not None and used:
            self.boost.remember(prompted, used[0].target)
        own = {"gate": self.config.gate, "used": [f.event_id for f in used], "added_tokens": added}
        return PromptedAsk(prompted, {"gate_tokens": 0, **log, **own, "dropped": log.get("dropped", 0) + len(facts) - len(used)})

    def fit_facts(self, ask: Ask, answer_tokens: int, facts: list[Version], prompt: Callable[..., str]) -> tuple[Ask, list[Version]]:
        """The question as `prompt(statements, question, template)` with as many of the facts as fit into the window, and these."""
        stated = [f.statement for f in facts]
        fitted, dropped = self.fit(ask, answer_tokens, len(facts), lambda n: prompt(stated[:n], ask.prompt, self.template))
        return fitted, facts[: len(facts) - dropped]


Accepted = tuple[list[Version], dict[str, Any]]
"""The facts that a gate accepts for a question, and its notes for `extras`."""
Gate = Callable[[ScrPredictor, Sequence[Ask], Sequence[list[Retrieved]]], list[Accepted]]
"""From questions and the facts retrieved for each to the facts accepted for each."""


def right_fact(predictor: ScrPredictor, asks: Sequence[Ask], retrieved: Sequence[list[Retrieved]]) -> list[Accepted]:
    """The version that now holds of the fact that the question is about, from the event id that an oracle is told."""
    alive, log = predictor.retriever.alive, predictor.retriever.log
    versions = [[row for row in predictor.store.rows_with(a.event_id or "") if row < len(alive) and alive[row]] for a in asks]
    return [([log[rows[-1]]] if rows else [], {}) for rows in versions]


def every_fact(predictor: ScrPredictor, asks: Sequence[Ask], retrieved: Sequence[list[Retrieved]]) -> list[Accepted]:
    """Every retrieved fact."""
    return [([r.fact for r in facts], {}) for facts in retrieved]


def near_fact(predictor: ScrPredictor, asks: Sequence[Ask], retrieved: Sequence[list[Retrieved]]) -> list[Accepted]:
    """The nearest fact, where its similarity reaches the threshold for questions with or without a picture."""
    least = [predictor.threshold[ask.image is not None] for ask in asks]
    accepted = [[r.fact for r in facts[:1] if r.similarity >= t] for facts, t in zip(retrieved, least)]
    return [(facts, {"threshold": round(t, 4)}) for facts, t in zip(accepted, least)]


def confirmed(predictor: ScrPredictor, asks: Sequence[Ask], retrieved: Sequence[list[Retrieved]]) -> list[Accepted]:
    """The fact that the model names when it is asked which one answers the question: the paper's confirmation step."""
    requests = [confirmation(predictor, a, facts) for a, facts in zip(asks, retrieved)]
    put = [r for r in requests if r.facts]
    replies = iter(predictor.base.generate([r.ask for r in put], GATE_TOKENS, [r.decided for r in put]))
    return [r.by_reply(next(replies)) if r.facts else ([], r.notes) for r in requests]


def likeliest(predictor: ScrPredictor, asks: Sequence[Ask], retrieved: Sequence[list[Retrieved]]) -> list[Accepted]:
    """The fact whose reply is the likeliest, or none where "none" is: confirmation in one forward pass without a generation."""
    requests = [confirmation(predictor, a, facts) for a, facts in zip(asks, retrieved)]
    logprobs = iter(reply_logprobs(predictor, [r for r in requests if r.facts]))
    return [r.by_logprobs(next(logprobs)) if r.facts else ([], r.notes) for r in requests]


GATES: dict[str, Gate] = {"oracle-context": right_fact, "topk": every_fact, "threshold": near_fact, "model": confirmed, "index": likeliest}


@dataclass(frozen=True)
class Confirmation:
    """The request to name the fact that answers a question. Facts that do not fit into the window are dropped and counted."""

    ask: Ask
    facts: list[Version]
    notes: dict[str, Any]

    def decided(self, reply: str) -> bool:
        """Whether the beginning of a reply tells which fact it names, or that it names none."""
        return prompts.decided(reply, [f.target for f in self.facts])

    def by_reply(self, reply: str) -> Accepted:
        """The fact that a generated reply names. The reply is stored as far as it was generated."""
        i = prompts.named_fact(reply, [f.target for f in self.facts])
        return [] if i is None else [self.facts[i]], {**self.notes, "said": reply}

    def by_logprobs(self, logprobs: np.ndarray) -> Accepted:
        """The fact with the largest of the (facts + 1,) log-probabilities of the replies, the nearer one of equals; the last is "none"."""
        i, share = int(logprobs.argmax()), np.exp(logprobs - np.logaddexp.reduce(logprobs))
        return [self.facts[i]] if i < len(self.facts) else [], {**self.notes, "p": round(float(share[i]), 4)}


def confirmation(predictor: ScrPredictor, ask: Ask, retrieved: list[Retrieved]) -> Confirmation:
    request, kept = predictor.fit_facts(ask, GATE_TOKENS, [r.fact for r in retrieved], prompts.which_fact)
    tokens = predictor.tokens(request) if kept else 0
    return Confirmation(request, kept, {"dropped": len(retrieved) - len(kept), "gate_tokens": tokens})


def reply_logprobs(predictor: ScrPredictor, requests: Sequence[Confirmation]) -> list[np.ndarray]:
    """(facts + 1,) log-probabilities of the replies to each request.

    Where the first tokens of the replies differ, theirs are read from one forward pass of the prompt; otherwise every
    reply is scored as a whole.
    """
    replies = [prompts.options([f.target for f in r.facts], predictor.template) for r in requests]
    ids = [[answer_ids(predictor.handle, r.ask, reply) for reply in own] for r, own in zip(requests, replies)]
    apart = [len({tuple(x) for x in own}) == len({x[0] for x in own}) for own in ids]
    read = [i for i, yes in enumerate(apart) if yes]
    inspected = iter(predictor.base.inspect([requests[i].ask for i in read], ids=[np.array([x[0] for x in ids[i]]) for i in read]))
    whole = [(i, reply) for i, yes in enumerate(apart) if not yes for reply in replies[i]]
    scores = iter(predictor.base.score([requests[i].ask for i, _ in whole], [reply for _, reply in whole]))
    sums = (np.array([float(next(scores).logprobs.sum()) for _ in own]) for own, yes in zip(replies, apart) if not yes)
    return [next(inspected).logprobs if yes else next(sums) for yes in apart]
