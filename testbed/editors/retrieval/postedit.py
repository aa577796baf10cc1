"""postEdit (Song et al. 2024, arXiv 2402.08631): the model is a black box; its answers are edited, not the model.

The model answers; the nearest fact is retrieved; a small editor model, trained for it, reads fact, question and
answer, and gives the answer as it now should be, or says that it stands. Here the editor model is one that
`python -m testbed.pretrain --course rewriting` makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from streams.base import TrainPool
from testbed.core.events import Ask
from testbed.core.registry import EDITORS
from testbed.editors.base import BadEditor, Traits
from testbed.editors.retrieval import prompts
from testbed.editors.retrieval.fact_editor import MemoryConfig, MemoryEditor, ledger
from testbed.editors.retrieval.fact_store import Version
from testbed.editors.retrieval.retriever import Found, Retriever
from testbed.model import loading
from testbed.model.encoding import prompt_inputs
from testbed.model.handle import BadModel, ModelHandle
from testbed.model.predictor import Inspection, ModelPredictor, Predictor, Response, Score, Tokens

COMMAND = "python -m testbed.pretrain --stream world-yearly --course rewriting --out DIR"


@dataclass(frozen=True)
class PostEditConfig(MemoryConfig):
    model: str = ""
    """Folder of the editor model, as `testbed.pretrain --course rewriting` writes it."""


@EDITORS.register("postedit")
class PostEdit(MemoryEditor):
    """Facts beside the model, and a second, small model that rewrites answers."""

    summary = "rewrites the model's answer with a small editor model where a fact applies (postEdit)"
    traits = Traits(gated=True, undo=True, uses=frozenset({"train_pool"}), learns="context")
    Config = PostEditConfig
    config: PostEditConfig

    def _prepare(self, pool: TrainPool) -> None:
        if not self.config.model:
            raise BadEditor(f"{self.name} needs an editor model: make one with {COMMAND} and give --set {self.name}.model=DIR")
        super()._prepare(pool)
        try:
            self.writer = loading.load(self.config.model, str(self.handle.device), str(self.handle.dtype).removeprefix("torch."))
        except BadModel as e:
            raise BadEditor(f"{self.name}.model: {e}. Make one with {COMMAND}") from e
        self.notes.append(f"answers are rewritten by {self.config.model} ({self.writer.hash}); it is asked {prompts.REWRITE!r}")

    def predictor(self) -> Predictor:
        return PostEditPredictor(self.retriever(), self.writer)


@dataclass(frozen=True)
class _Draft:
    """An answer of the model, the fact nearest to the question, and what the editor model is asked (None: nothing)."""

    response: Response
    fact: Found | None
    ask: Ask | None


class PostEditPredictor(Predictor):
    """The model's own answers, rewritten by the editor model where it does not say that they stand."""

    def __init__(self, retriever: Retriever, writer: ModelHandle) -> None:
        self.retriever, self._writer_handle = retriever, writer
        self.base, self.writer = ModelPredictor(retriever.handle), ModelPredictor(writer)

    def respond(self, asks: Sequence[Ask], answers: Sequence[str | None], max_new_tokens: int = 16) -> list[Response]:
        own = self.base.respond(asks, answers, max_new_tokens)
        found = self.retriever.nearest(asks, 1)
        drafts = [self._draft(a, r, f, max_new_tokens) for a, r, f in zip(asks, own, found)]
        places = [i for i, d in enumerate(drafts) if d.ask is not None]
        written = self.writer.respond([d.ask for d in drafts if d.ask], [answers[i] for i in places], max_new_tokens)
        new = dict(zip(places, written))
        return [self._final(d, new.get(i)) for i, d in enumerate(drafts)]

    def _draft(self, ask: Ask, response: Response, found: list[Found], room: int) -> _Draft:
        if not found:
            return _Draft(response, None, None)
        told = Ask(prompts.rewrite(_stated(found[0].fact), ask.prompt, response.generated))
        fits = self._tokens(told) + room <= self._writer_handle.window
        return _Draft(response, found[0], told if fits else None)

    def _tokens(self, ask: Ask) -> int:
        return prompt_inputs(self._writer_handle, ask)["input_ids"].shape[1]

    def _final(self, draft: _Draft, written: Response | None) -> Response:
        """The rewritten answer, or the model's own where it stands; `extras` say which."""
        notes: dict[str, Any] = ledger([draft.fact] if draft.fact else [])
        notes["added_tokens"] = self._tokens(draft.ask) if draft.ask else 0
        notes["dropped"] = int(draft.fact is not None and draft.ask is None)
        stands = written is None or written.generated.strip().rstrip(".").casefold() == prompts.RETAIN
        if draft.fact is None or written is None or stands:
            return replace(draft.response, extras={**notes, "used": []})
        return replace(written, extras={**notes, "used": [draft.fact.fact.event_id], "before": draft.response.generated})

    def score(self, asks: Sequence[Ask], answers: Sequence[str]) -> list[Score]:
        return [r.score for r in self.respond(asks, answers) if r.score is not None]

    def text_logprobs(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.base.text_logprobs(texts)

    def inspect(self, asks: Sequence[Ask], layers: Sequence[int] = (), top_k: int = 10, ids: Tokens = None) -> list[Inspection]:
        """The black box itself, which no edit changes."""
        return self.base.inspect(asks, layers, top_k, ids)


def _stated(fact: Version) -> str:
    return prompts.statement(fact.prompt, fact.target)
