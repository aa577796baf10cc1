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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch

from testbed.core.events import Ask
from testbed.core.grading import natural_stop
from testbed.core.timing import timed
from testbed.model.encoding import Batch, answer_ids, collate, prompt_inputs, text_batch, text_tokens
from testbed.model.generation import AnswerScorer, Decided, DecidedReplies, FirstLine, Score, TopKSampler, greedy_decoding
from testbed.model.handle import ModelHandle
from testbed.model.packed_answers import packed_answers, packed_scores
from testbed.model.packed_rows import Row, takes_packed_rows

_PACKED = 4
"""Packed rows for each padded one in a batch: they are shorter, and the last rows of a generation, few to a step, are costly."""
R = TypeVar("R")
Around = Callable[[Batch], AbstractContextManager[Any]]


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

    def generate(self, asks: Sequence[Ask], max_new_tokens: int = 16, decided: Sequence[Decided] | None = None) -> list[str]:
        """Greedy generation with natural stop; with `decided`, a function a row, it may end where the reply is decided."""
        return [r.generated for r in self.respond(asks, [None] * len(asks), max_new_tokens)]


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
        weights: changed parameters by name; without them and without `around` it is the unedited model.
        around: context entered for every batch, whose rows it may treat differently (hooks).
        explain: rows of `extras` for the batch that was just run, called inside the context.
        rows, tokens: limits of one forward; packed rows may be four times as many.

    Prompts without a picture are packed (`testbed.model.packed_rows`) where nothing treats rows differently; others are padded.
    """

    def __init__(
        self,
        handle: ModelHandle,
        around: Around | None = None,
        explain: Callable[[Batch], list[dict[str, Any]]] | None = None,
        rows: int = 64,
        tokens: int = 16_384,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        self.handle, self.rows, self.tokens, self.explain = handle, rows, tokens, explain
        self.weights: Mapping[str, torch.Tensor] = weights or {}
        self.around: Around = around or (lambda batch: handle.swapped(self.weights))
        self._rows_alike = around is None
        self.fingerprint = "base" if around is None and weights is None else None

    def respond(self, asks: Sequence[Ask], answers: Sequence[str | None], max_new_tokens: int = 16) -> list[Response]:
        ids = [self._answer(a, x) if x is not None else [] for a, x in zip(asks, answers)]
        return self._respond(asks, ids, max_new_tokens, None)

    def generate(self, asks: Sequence[Ask], max_new_tokens: int = 16, decided: Sequence[Decided] | None = None) -> list[str]:
        return [r.generated for r in self._respond(asks, [[] for _ in asks], max_new_tokens, decided)]

    @torch.no_grad()
    def _respond(self, asks: Sequence[Ask], ids: Sequence[Row], max_new_tokens: int, decided: Sequence[Decided] | None) -> list[Response]:
        def packed(at: list[int]) -> list[Response]:
            own = decided and [decided[i] for i in at]
            return self._generate_packed([asks[i] for i in at], [ids[i] for i in at], max_new_tokens, own)

        def padded(at: list[int]) -> list[Response]:
            own = decided and [decided[i] for i in at]
            return self._generate([asks[i] for i in at], [ids[i] for i in at], max_new_tokens, own)

        if any(a.sampled for a in asks):
            made = self._some_drawn(asks, ids, max_new_tokens, decided)
        else:
            made = self._packed_or_padded(asks, max(max_new_tokens, *map(len, ids)) if ids else 0, packed, padded)
        again = [i for i, r in enumerate(made) if ids[i] and r.score is None]
        scores = dict(zip(again, self._score([asks[i] for i in again], [ids[i] for i in again])))
        return [replace(r, score=scores[i]) if i in scores else r for i, r in enumerate(made)]

    def _some_drawn(
        self, asks: Sequence[Ask], ids: Sequence[Row], max_new_tokens: int, decided: Sequence[Decided] | None
    ) -> list[Response]:
        """Responses to asks of which some are sampled; to the others the greedy ones."""
        drawn, rest = ([i for i, a in enumerate(asks) if (a.sampled is not None) is want] for want in (True, False))
        own = decided and [decided[i] for i in rest]
        found = dict(zip(rest, self._respond([asks[i] for i in rest], [ids[i] for i in rest], max_new_tokens, own) if rest else []))
        texts = self._in_parts(self._chunks([asks[i] for i in drawn]), lambda at: self._draw([asks[drawn[k]] for k in at]))
        found |= zip(drawn, texts)
        return [found[i] for i in range(len(asks))]

    def _draw(self, asks: list[Ask]) -> list[Response]:
        """Texts of the full length that each ask names, as far as the window reaches; end tokens are drawn like others and left out."""
        sampled = [a.sampled for a in asks if a.sampled is not None]
        with timed("encode"):
            batch = collate(self.handle, asks, side="left")
        start, longest = batch.inputs["input_ids"].shape[1], max(s.tokens for s in sampled)
        with self.around(batch), greedy_decoding(self.handle, ends=False), timed("decode"):
            limits: Any = {"max_new_tokens": max(1, min(longest, self.handle.window - start))}
            tokens = self.handle.model.generate(**batch.inputs, **limits, logits_processor=[TopKSampler(sampled)])
            extras = self.explain(batch) if self.explain else [{} for _ in asks]
        new = [row[start : start + s.tokens] for row, s in zip(tokens, sampled)]
        texts = self.handle.tokenizer.batch_decode(new, skip_special_tokens=True)
        return [Response(text, None, extra) for text, extra in zip(texts, extras)]

    @torch.no_grad()
    def score(self, asks: Sequence[Ask], answers: Sequence[str]) -> list[Score]:
        return self._score(asks, [self._answer(a, x) for a, x in zip(asks, answers)])

    def _answer(self, ask: Ask, answer: str) -> Row:
        """The tokens of an answer as far as the window reaches: a reply of the model's own may take more than it was generated with."""
        room = self.handle.window - prompt_inputs(self.handle, ask)["input_ids"].shape[1]
        return answer_ids(self.handle, ask, answer)[: max(1, room)]

    def _packed_or_padded(
        self,
        asks: Sequence[Ask],
        steps: int,
        packed: Callable[[list[int]], list[R]],
        padded: Callable[[list[int]], list[R]],
        lengths: Sequence[int] | None = None,
    ) -> list[R]:
        """Results of some work on batches of asks, given by their indices: packed where the model allows it, else padded.

        steps: most tokens behind a prompt. lengths: of what follows each prompt in a padded batch.
        """
        own = [i for i, a in enumerate(asks) if a.image is None] if self._rows_alike else []
        prompts = {i: self._prompt(asks[i]) for i in own}
        if not prompts or not takes_packed_rows(self.handle, list(prompts.values()), steps):
            prompts = {}
        rest = [i for i in range(len(asks)) if i not in prompts]
        found = dict(zip(sorted(prompts), self._in_parts(self._chunks_by_beginning(prompts), packed)))
        chunks = self._chunks([asks[i] for i in rest], lengths and [lengths[i] for i in rest])
        found |= zip(rest, self._in_parts(([rest[k] for k in chunk] for chunk in chunks), padded))
        return [found[i] for i in range(len(asks))]

    def _prompt(self, ask: Ask) -> Row:
        return prompt_inputs(self.handle, ask)["input_ids"][0].tolist()

    def _chunks_by_beginning(self, prompts: Mapping[int, Row]) -> Iterator[list[int]]:
        """Indices of prompts in batches within the limits, those that begin alike together."""
        chunk: list[int] = []
        for i in sorted(prompts, key=lambda i: (prompts[i], i)):
            longest = max(len(prompts[k]) for k in (*chunk, i))
            most = self.handle.memory_limit.limit(_PACKED * self.rows)
            if chunk and (len(chunk) >= most or (len(chunk) + 1) * longest > self.tokens):
                yield chunk
                chunk = []
            chunk.append(i)
        if chunk:
            yield chunk

    def _generate_packed(self, asks: list[Ask], ids: list[Row], max_new_tokens: int, decided: Sequence[Decided] | None) -> list[Response]:
        with self.handle.swapped(self.weights), timed("prefill") as turn:
            prompts = [self._prompt(a) for a in asks]
            found = packed_answers(self.handle, prompts, ids, max_new_tokens, decided, then=lambda: turn("decode"))
        texts = self.handle.tokenizer.batch_decode([a.made for a in found], skip_special_tokens=True)
        return [Response(natural_stop(text), a.score, {}, a.first_ids) for text, a in zip(texts, found)]

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

    def _generate(self, asks: list[Ask], ids: list[Row], max_new_tokens: int, decided: Sequence[Decided] | None) -> list[Response]:
        """One prefill for both scoring modes: where the generation follows the answer, its logits are the teacher-forced ones."""
        with timed("encode"):
            batch = collate(self.handle, asks, side="left")
        with self.around(batch), greedy_decoding(self.handle), timed("prefill") as turn:
            scorer = AnswerScorer(ids, then=lambda: turn("decode"))
            start = batch.inputs["input_ids"].shape[1]
            stop = [FirstLine(self.handle, ids, start), *([DecidedReplies(self.handle, decided, start)] if decided else [])]
            limits: Any = {"max_new_tokens": max(1, min(max_new_tokens, self.handle.window - start)), "stopping_criteria": stop}
            tokens = self.handle.model.generate(**batch.inputs, **limits, logits_processor=[scorer])
            extras = self.explain(batch) if self.explain else [{} for _ in asks]
        new = tokens[:, start:]
        texts = self.handle.tokenizer.batch_decode(new, skip_special_tokens=True)
        read = zip(texts, scorer.scores(), extras, scorer.first_ids())
        return [Response(natural_stop(text), score, extra, first) for text, score, extra, first in read]

    def _last_logits(self, batch: Batch, n: int) -> torch.Tensor:
        """Logits of a left-padded batch: of the last n positions where the model can leave out the others, else of all."""
        can = "logits_to_keep" in inspect.signature(self.handle.model.forward).parameters
        return self.handle.model(**batch.inputs, use_cache=False, **({"logits_to_keep": n} if can else {})).logits

    def _score(self, asks: Sequence[Ask], ids: Sequence[Row]) -> list[Score]:
        def packed(at: list[int]) -> list[Score]:
            with self.handle.swapped(self.weights), timed("score"):
                return packed_scores(self.handle, [self._prompt(asks[i]) for i in at], [ids[i] for i in at])

        def padded(at: list[int]) -> list[Score]:
            return self._forced([asks[i] for i in at], [ids[i] for i in at])

        lengths = [len(x) for x in ids]
        return self._packed_or_padded(asks, max(lengths, default=0), packed, padded, lengths)

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
