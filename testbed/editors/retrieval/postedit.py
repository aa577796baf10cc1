"""postEdit (Song et al. 2024, arXiv 2402.08631): the model is a black box whose answers are edited instead of its weights.

The three parts of the paper's framework, for a question x:

1. The model gives its answer y to x without any edit.
2. The fact nearest to x is retrieved from the edit memory, here the fact store.
3. The post-editor, a small model trained for it, reads fact, x and y and writes the answer that agrees with the fact, or
   "retain" where the fact does not concern x; then y stands.

The post-editor is a model that `python -m testbed.pretrain --course rewriting` makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from streams.base import TrainPool
from testbed.core.events import Ask
from testbed.core.registry import EDITORS
from testbed.editors.base import BadEditor, Traits
from testbed.editors.retrieval import prompts
from testbed.editors.retrieval.fact_editor import FactEditor, FactEditorConfig, retrieval_log
from testbed.editors.retrieval.retriever import Retrieved, Retriever
from testbed.model import loading
from testbed.model.encoding import prompt_inputs
from testbed.model.handle import BadModel, ModelHandle
from testbed.model.predictor import ModelPredictor, OverModel, Predictor, Response

COMMAND = "python -m testbed.pretrain --stream world-yearly --course rewriting --out DIR"


@dataclass(frozen=True)
class PostEditConfig(FactEditorConfig):
    model: str = ""
    """Folder of the post-editor, as `testbed.pretrain --course rewriting` writes it."""


@EDITORS.register("postedit")
class PostEdit(FactEditor):
    """Keeps facts beside the model and lets a second, small model rewrite the answers. State: as `FactEditor`."""

    summary = "rewrites the model's answer with a small editor model where a fact applies (postEdit)"
    traits = Traits(gated=True, undo=True, uses=frozenset({"train_pool"}), learns="context")
    Config = PostEditConfig
    config: PostEditConfig

    def _prepare(self, pool: TrainPool) -> None:
        if not self.config.model:
            raise BadEditor(f"{self.name} needs an editor model: make one with {COMMAND} and give --set {self.name}.model=DIR")
        super()._prepare(pool)
        try:
            self.post_editor = loading.load(self.config.model, str(self.handle.device), str(self.handle.dtype).removeprefix("torch."))
        except BadModel as e:
            raise BadEditor(f"{self.name}.model: {e}. Make one with {COMMAND}") from e
        self.notes.append(f"answers are rewritten by {self.config.model} ({self.post_editor.hash}); it is asked {prompts.REWRITE!r}")

    def predictor(self) -> Predictor:
        return PostEditPredictor(self.retriever(), self.post_editor)


class PostEditPredictor(OverModel):
    """The model's own answers, rewritten by the post-editor where it does not reply "retain"."""

    def __init__(self, retriever: Retriever, post_editor: ModelHandle) -> None:
        self.retriever = retriever
        self.base, self.post_editor = ModelPredictor(retriever.handle), ModelPredictor(post_editor)

    def respond(self, asks: Sequence[Ask], answers: Sequence[str | None], max_new_tokens: int = 16) -> list[Response]:
        own = self.base.respond(asks, answers, max_new_tokens)
        retrieved = self.retriever.nearest(asks, 1)
        requests = [self._request(a, y.generated, facts, max_new_tokens) for a, y, facts in zip(asks, own, retrieved)]
        references = [answer for answer, request in zip(answers, requests) if request]
        written = iter(self.post_editor.respond([r for r in requests if r], references, max_new_tokens))
        return [self._final(y, facts, r, next(written) if r else None) for y, facts, r in zip(own, retrieved, requests)]

    def _request(self, ask: Ask, answer: str, retrieved: list[Retrieved], answer_tokens: int) -> Ask | None:
        """The request to the post-editor; None without a fact, and for a fact too long for the post-editor's window."""
        if not retrieved:
            return None
        request = Ask(prompts.rewrite(retrieved[0].fact.statement, ask.prompt, answer))
        return request if self._tokens(request) + answer_tokens <= self.post_editor.handle.window else None

    def _tokens(self, request: Ask) -> int:
        return prompt_inputs(self.post_editor.handle, request)["input_ids"].shape[1]

    def _final(self, own: Response, retrieved: list[Retrieved], request: Ask | None, written: Response | None) -> Response:
        """The rewritten answer, or the model's own where it stands; `extras` say which."""
        notes: dict[str, Any] = retrieval_log(retrieved)
        notes["added_tokens"] = self._tokens(request) if request else 0
        notes["dropped"] = int(bool(retrieved) and request is None)
        if written is None or written.generated.strip().rstrip(".").casefold() == prompts.RETAIN:
            return replace(own, extras={**notes, "used": []})
        return replace(written, extras={**notes, "used": [retrieved[0].fact.event_id], "before": own.generated})
