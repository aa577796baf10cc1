"""What a probe sees of a model: score, generate, respond (both at once), inspect.

Batching and length bucketing live here and only here. A forward that memory does not hold is run in halves, and no
later one is as wide.

A predictor is given prompts and pictures, never a question's event, split or answer. A gated editor makes its decision
in `around`, a context that is entered once a batch and sees the prompt mask: it decides once a sequence, before the
first new token.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from testbed.core.events import Ask
from testbed.core.grading import natural_stop
from testbed.core.timing import timed
from testbed.model.encoding import Batch, answer_ids, collate, prompt_inputs, text_batch, text_tokens
from testbed.model.handle import ModelHandle

FIRST_IDS = 10
"""How many of the likeliest first tokens a response names."""
R = TypeVar("R")
Around = Callable[[Batch], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Score:
    """Teacher-forced score of one answer of n tokens.

    hits: (n,) bool, the token is the argmax given the prompt and the true tokens before it.
    logprobs: (n,) float64, natural log-probabilities.
    """

    hits: np.ndarray
    logprobs: np.ndarray


@dataclass(frozen=True)
class Response:
    """Free generation and, where an answer was given, its score. `extras` holds what the editor adds (gate, entry, context).

    first_ids: the ids of the `FIRST_IDS` likeliest first tokens, likeliest first; () where they were not read.
    """

    generated: str
    score: Score | None = None
    extras: dict[str, Any] = field(default_factory=dict)
    first_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """What monitors read at the last prompt position.

    top_ids: (k,) int64 most likely next tokens, or the tokens that were asked for; logprobs: (k,) float64, their
    natural log-probabilities; entropy: nats; hidden: (layers, d) float32 output of each chosen decoder layer.
    """

    top_ids: np.ndarray
    logprobs: np.ndarray
    entropy: float
    hidden: np.ndarray


Tokens = Sequence[np.ndarray] | None
"""For each ask the ids (k,) whose log-probabilities an inspection is to give; None: the top k."""


class Predictor(ABC):
    """Answers prompts. Implementations leave parameters, buffers and the editor's state bit-identical.

    `fingerprint` names the function that is computed, where it has a name: predictors with one fingerprint answer alike,
    so that answers of one serve for the other. "base" is the unedited model.
    """

    fingerprint: str | None = None

    @abstractmethod
    def respond(self, asks: Sequence[Ask], answers: Sequence[str | None], max_new_tokens: int = 16) -> list[Response]:
        """Greedy generation with natural stop, and the score of each answer that is given."""

    @abstractmethod
    def score(self, asks: Sequence[Ask], answers: Sequence[str]) -> list[Score]:
        """Per-token argmax hits and log-probabilities of each answer under teacher forcing."""

    @abstractmethod
    def text_logprobs(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Log-probabilities (nats) of each token of running text after the first, for perplexity."""

    @abstractmethod
    def inspect(self, asks: Sequence[Ask], layers: Sequence[int] = (), top_k: int = 10, ids: Tokens = None) -> list[Inspection]: ...

    def generate(self, asks: Sequence[Ask], max_new_tokens: int = 16) -> list[str]:
        """Greedy generation with natural stop."""
        return [r.generated for r in self.respond(asks, [None] * len(asks), max_new_tokens)]


class AnswerScorer:
    """A logits processor that changes nothing and scores the answers' tokens while generation follows them.

    Args:
        answers: token ids, a row each.
        then: called once, when the first token is known.
    """

    def __init__(self, answers: list[list[int]], then: Callable[[], None] = lambda: None) -> None:
        self.answers, self._then = answers, then
        longest = max((len(a) for a in answers), default=0)
        self._target = torch.zeros(len(answers), longest, dtype=torch.long)
        for i, a in enumerate(answers):
            self._target[i, : len(a)] = torch.tensor(a, dtype=torch.long)
        self._first: torch.Tensor | None = None
        self._hits: list[torch.Tensor] = []
        self._logp: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._first is None:
            self._first = scores.topk(min(FIRST_IDS, scores.shape[-1]), -1).indices.cpu()
            self._then()
        step = len(self._hits)
        if step < self._target.shape[1]:
            target = self._target[:, step].to(scores.device)
            self._hits.append((scores.argmax(-1) == target).cpu())
            self._logp.append(scores.float().log_softmax(-1).gather(1, target[:, None])[:, 0].double().cpu())
        return scores

    def first_ids(self) -> list[tuple[int, ...]]:
        """The likeliest first tokens of each row."""
        return [tuple(row) for row in self._first.tolist()] if self._first is not None else [() for _ in self.answers]

    def scores(self) -> list[Score | None]:
        """A score for every row whose generation followed the answer up to its last token; None for the others."""
        if not self._hits:
            return [None for _ in self.answers]
        hits, logp = torch.stack(self._hits, 1).numpy(), torch.stack(self._logp, 1).numpy()
        out: list[Score | None] = []
        for i, a in enumerate(self.answers):
            n = len(a)
            known = 0 < n <= hits.shape[1] and bool(hits[i, : n - 1].all())
            out.append(Score(hits[i, :n].copy(), logp[i, :n].copy()) if known else None)
        return out


class FirstLine:
    """A stopping criterion: a row ends behind its first line, because `natural_stop` drops what follows.

    A row goes on while it still follows its answer, so that an answer of several lines is scored to its end.

    Args:
        handle: the model whose tokenizer says which tokens break a line.
        answers: token ids, a row each.
        start: token position at which the generation starts.
    """

    def __init__(self, handle: ModelHandle, answers: Sequence[Sequence[int]], start: int) -> None:
        self._text, self._break, self._inner = _line_tokens(handle)
        self._answers, self._start, self._seen = answers, start, 0
        self._begun = torch.zeros(len(answers), dtype=torch.bool)
        self._ended = torch.zeros(len(answers), dtype=torch.bool)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        new = input_ids[:, self._start + self._seen :].cpu()
        for token in new.T:
            self._ended |= (self._break[token] & self._begun) | self._inner[token]
            self._begun |= self._text[token]
        self._seen += new.shape[1]
        made = input_ids[:, self._start :].tolist()
        follows = torch.tensor([len(a) > len(m) and list(a[: len(m)]) == m for a, m in zip(self._answers, made)])
        return (self._ended & ~follows).to(input_ids.device)


def _line_tokens(handle: ModelHandle) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(V,) bool each: the token holds more than white space; it holds a line break; it holds one behind other text."""
    if "line tokens" not in handle.cache:
        size = handle.model.get_input_embeddings().num_embeddings
        texts = handle.tokenizer.batch_decode([[i] for i in range(min(size, len(handle.tokenizer)))], skip_special_tokens=True)
        texts = [t.replace("\ufffd", "") for t in texts] + [""] * (size - len(texts))  # a part of a character may be of white space
        text, breaks = torch.tensor([bool(t.strip()) for t in texts]), torch.tensor(["\n" in t for t in texts])
        handle.cache["line tokens"] = (text, breaks, torch.tensor([t.lstrip().find("\n") > 0 for t in texts]))
    return handle.cache["line tokens"]


class OverModel(Predictor):
    """A predictor that changes questions or answers and leaves the rest to another one, `base`."""

    base: Predictor

    def score(self, asks: Sequence[Ask], answers: Sequence[str]) -> list[Score]:
        return [r.score for r in self.respond(asks, answers) if r.score is not None]

    def text_logprobs(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self.base.text_logprobs(texts)

    def inspect(self, asks: Sequence[Ask], layers: Sequence[int] = (), top_k: int = 10, ids: Tokens = None) -> list[Inspection]:
        return self.base.inspect(asks, layers, top_k, ids)


class ModelPredictor(Predictor):
    """A model behind a handle, with what an editor changes for the length of a forward.

    Args:
        around: context entered for every batch (weight swap, hooks); None is the unedited model.
        explain: rows of `extras` for the batch that was just run, called inside the context.
        rows, tokens: limits of one forward.
    """

    def __init__(
        self,
        handle: ModelHandle,
        around: Around | None = None,
        explain: Callable[[Batch], list[dict[str, Any]]] | None = None,
        rows: int = 64,
        tokens: int = 16_384,
    ) -> None:
        self.handle, self.rows, self.tokens = handle, rows, tokens
        self.around: Around = around or (lambda batch: nullcontext())
        self.explain = explain
        self.fingerprint = "base" if around is None else None

    @torch.no_grad()
    def respond(self, asks: Sequence[Ask], answers: Sequence[str | None], max_new_tokens: int = 16) -> list[Response]:
        ids = [answer_ids(self.handle, a, x) if x is not None else [] for a, x in zip(asks, answers)]
        made = self._in_parts(
            self._chunks(asks), lambda part: self._generate([asks[i] for i in part], [ids[i] for i in part], max_new_tokens)
        )
        again = [i for i, r in enumerate(made) if ids[i] and r.score is None]
        scores = dict(zip(again, self._score([asks[i] for i in again], [ids[i] for i in again])))
        return [replace(r, score=scores[i]) if i in scores else r for i, r in enumerate(made)]

    @torch.no_grad()
    def score(self, asks: Sequence[Ask], answers: Sequence[str]) -> list[Score]:
        return self._score(asks, [answer_ids(self.handle, a, x) for a, x in zip(asks, answers)])

    @torch.no_grad()
    def text_logprobs(self, texts: Sequence[str]) -> list[np.ndarray]:
        ids = [text_tokens(self.handle, t) for t in texts]
        parts = [list(range(at, min(at + self.rows, len(ids)))) for at in range(0, len(ids), self.rows)]
        return self._in_parts(parts, lambda part: self._running([ids[i] for i in part]))

    def _running(self, ids: list[list[int]]) -> list[np.ndarray]:
        batch = text_batch(self.handle, ids)
        with self.around(batch):
            logits = self.handle.model(**batch.inputs, use_cache=False).logits
        out = []
        for row, seq in zip(logits.float().log_softmax(-1), ids):
            target = torch.tensor(seq[1:], device=row.device, dtype=torch.long)
            out.append(row[: len(seq) - 1].gather(1, target[:, None])[:, 0].double().cpu().numpy())
        return out

    @torch.no_grad()
    def inspect(self, asks: Sequence[Ask], layers: Sequence[int] = (), top_k: int = 10, ids: Tokens = None) -> list[Inspection]:
        return self._in_parts(
            self._chunks(asks), lambda part: self._inspect_part([asks[i] for i in part], layers, top_k, ids and [ids[i] for i in part])
        )

    def _inspect_part(self, asks: list[Ask], layers: Sequence[int], top_k: int, ids: Tokens) -> list[Inspection]:
        batch = collate(self.handle, asks, side="left")
        with self.around(batch), self._layer_outputs(layers) as seen:
            logits = self._last_logits(batch, 1)
        logp = logits[:, -1].double().log_softmax(-1)
        states = [seen[n][:, -1].float().cpu() for n in layers]
        hidden = torch.stack(states, 1) if states else torch.zeros(len(asks), 0, self.handle.width)
        entropy = torch.special.entr(logp.exp()).sum(-1)
        out = []
        for j in range(len(asks)):
            top = logp[j].topk(top_k).indices if ids is None else torch.as_tensor(ids[j], device=logp.device)
            out.append(Inspection(top.cpu().numpy(), logp[j][top].cpu().numpy(), float(entropy[j]), hidden[j].numpy()))
        return out

    @contextmanager
    def _layer_outputs(self, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
        """The outputs (B, T, d) of these decoder layers, filled as the model runs."""
        seen: dict[int, torch.Tensor] = {}

        def keep(layer: int, output: Any) -> None:
            seen[layer] = output[0] if isinstance(output, tuple) else output

        with ExitStack() as stack:
            for n in layers:
                module = self.handle.layers[self.handle.layer_index(n)]
                stack.enter_context(self.handle.hooked(module, lambda m, args, output, n=n: keep(n, output)))
            yield seen

    def _in_parts(self, parts: Iterable[list[int]], work: Callable[[list[int]], list[R]]) -> list[R]:
        """The results of some work on parts of 0, 1, .. (smaller ones where memory runs out), in the order of these indices."""
        found = {i: x for part, results in self.handle.memory_limit.fitting(parts, work) for i, x in zip(part, results)}
        return [found[i] for i in sorted(found)]

    def _chunks(self, asks: Sequence[Ask], answer_lengths: Sequence[int] | None = None) -> Iterator[list[int]]:
        """Indices of the asks in batches of like length, pictures apart from text, within the limits."""
        size = [
            prompt_inputs(self.handle, a)["input_ids"].shape[1] + (answer_lengths[i] if answer_lengths else 0) for i, a in enumerate(asks)
        ]
        order = sorted(range(len(asks)), key=lambda i: (asks[i].image is None, size[i], i))
        chunk: list[int] = []
        for i in order:
            full = len(chunk) >= self.handle.memory_limit.limit(self.rows) or (len(chunk) + 1) * size[i] > self.tokens
            if chunk and (full or (asks[chunk[0]].image is None) != (asks[i].image is None)):
                yield chunk
                chunk = []
            chunk.append(i)
        if chunk:
            yield chunk

    def _generate(self, asks: list[Ask], ids: list[list[int]], max_new_tokens: int) -> list[Response]:
        """One prefill for both scoring modes: where the generation follows the answer, its logits are the teacher-forced ones."""
        with timed("encode"):
            batch = collate(self.handle, asks, side="left")
        with self.around(batch), _greedy_decoding(self.handle), timed("prefill") as turn:
            scorer = AnswerScorer(ids, then=lambda: turn("decode"))
            stop = FirstLine(self.handle, ids, batch.inputs["input_ids"].shape[1])
            limits: Any = {"max_new_tokens": max_new_tokens, "stopping_criteria": [stop]}
            tokens = self.handle.model.generate(**batch.inputs, **limits, logits_processor=[scorer])
            extras = self.explain(batch) if self.explain else [{} for _ in asks]
        new = tokens[:, batch.inputs["input_ids"].shape[1] :]
        texts = self.handle.tokenizer.batch_decode(new, skip_special_tokens=True)
        read = zip(texts, scorer.scores(), extras, scorer.first_ids())
        return [Response(natural_stop(text), score, extra, first) for text, score, extra, first in read]

    def _last_logits(self, batch: Batch, n: int) -> torch.Tensor:
        """Logits of a left-padded batch: of the last n positions where the model can leave out the others, else of all."""
        can = "logits_to_keep" in inspect.signature(self.handle.model.forward).parameters
        return self.handle.model(**batch.inputs, use_cache=False, **({"logits_to_keep": n} if can else {})).logits

    def _score(self, asks: Sequence[Ask], ids: Sequence[list[int]]) -> list[Score]:
        chunks = self._chunks(asks, [len(x) for x in ids])
        return self._in_parts(chunks, lambda part: self._forced([asks[i] for i in part], [ids[i] for i in part]))

    def _forced(self, asks: list[Ask], ids: list[list[int]]) -> list[Score]:
        """One teacher-forced forward."""
        batch = collate(self.handle, asks, ids, side="left")
        with self.around(batch), timed("score"):
            logits = self._last_logits(batch, 1 + max(map(len, ids)))
        logp = logits[batch.before_answer[:, -logits.shape[1] :]].float().log_softmax(-1)
        target = batch.answer_ids
        hits = (logp.argmax(-1) == target).cpu().numpy()
        logprobs = logp.gather(1, target[:, None])[:, 0].double().cpu().numpy()
        ends = np.cumsum([len(x) for x in ids]).tolist()
        return [Score(hits[end - len(x) : end], logprobs[end - len(x) : end]) for x, end in zip(ids, ends)]


@contextmanager
def _greedy_decoding(handle: ModelHandle) -> Iterator[None]:
    """Greedy decoding in the place of a checkpoint's own settings (sampling, penalties, beams); its end tokens are kept."""
    from transformers import GenerationConfig

    owners = [m for m in handle.model.modules() if isinstance(getattr(m, "generation_config", None), GenerationConfig)]
    kept = [m.generation_config for m in owners]
    own = handle.model.generation_config.eos_token_id
    ends = {handle.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    plain = GenerationConfig(do_sample=False, num_beams=1, eos_token_id=sorted(ends), pad_token_id=handle.tokenizer.pad_token_id)
    try:
        for m in owners:
            m.generation_config = plain
        yield
    finally:
        for m, config in zip(owners, kept):
            m.generation_config = config
