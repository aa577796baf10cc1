"""Generation: what ends a row, how answers are scored while generation follows them, and how texts are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from testbed.core.events import Sampling
from testbed.model.handle import ModelHandle

FIRST_IDS = 10
"""How many of the likeliest first tokens a response names."""


@dataclass(frozen=True)
class Score:
    """Teacher-forced score of one answer of n tokens.

    hits: (n,) bool, the token is the argmax given the prompt and the true tokens before it.
    logprobs: (n,) float64, natural log-probabilities.
    """

    hits: np.ndarray
    logprobs: np.ndarray


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


class TopKSampler:
    """A logits processor that leaves one token of each row, drawn among the likeliest by their probabilities.

    A row's tokens depend on its own numbers alone, whatever stands beside it in the batch.

    Args:
        sampled: how each row is drawn; a row whose numbers are used up repeats its last one.
    """

    def __init__(self, sampled: Sequence[Sampling]) -> None:
        self._most, self._step = max(s.top_k for s in sampled), 0
        self._top_k = torch.tensor([s.top_k for s in sampled])
        draws, longest = [s.draws() for s in sampled], max(s.tokens for s in sampled)
        self._draws = torch.from_numpy(np.stack([np.pad(d, (0, longest - len(d)), mode="edge") for d in draws]))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        top = scores.double().topk(min(self._most, scores.shape[-1]), -1)
        beyond = torch.arange(top.values.shape[1], device=scores.device) >= self._top_k.to(scores.device)[:, None]
        reached = top.values.masked_fill(beyond, -torch.inf).softmax(-1).cumsum(-1)
        drawn = self._draws[:, min(self._step, self._draws.shape[1] - 1)].to(scores.device)
        at = (reached <= drawn[:, None]).sum(-1, keepdim=True)
        chosen = top.indices.gather(1, torch.minimum(at, self._top_k.to(at.device)[:, None] - 1).clamp(max=top.indices.shape[1] - 1))
        self._step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


class LineEnds:
    """Rows of new tokens as they come: a row has ended behind its first line, because `natural_stop` drops what follows.

    ended: (B,) bool. The rows are those of `handle`'s tokenizer, which says which tokens break a line.
    """

    def __init__(self, handle: ModelHandle, rows: int) -> None:
        self._text, self._break, self._inner = _line_tokens(handle)
        self._begun = torch.zeros(rows, dtype=torch.bool)
        self.ended = torch.zeros(rows, dtype=torch.bool)

    def see(self, tokens: Int[Tensor, " b"], rows: Any = slice(None)) -> None:
        """One more token of each of some rows."""
        self.ended[rows] |= (self._break[tokens] & self._begun[rows]) | self._inner[tokens]
        self._begun[rows] |= self._text[tokens]


class FirstLine:
    """A stopping criterion: a row ends behind its first line.

    A row goes on while it still follows its answer, so that an answer of several lines is scored to its end.

    Args:
        answers: token ids, a row each.
        start: token position at which the generation starts.
    """

    def __init__(self, handle: ModelHandle, answers: Sequence[Sequence[int]], start: int) -> None:
        self._lines = LineEnds(handle, len(answers))
        self._answers, self._start, self._seen = answers, start, 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        new = input_ids[:, self._start + self._seen :].cpu()
        for token in new.T:
            self._lines.see(token)
        self._seen += new.shape[1]
        made = input_ids[:, self._start :].tolist()
        follows = torch.tensor([len(a) > len(m) and list(a[: len(m)]) == m for a, m in zip(self._answers, made)])
        return (self._lines.ended & ~follows).to(input_ids.device)


def _line_tokens(handle: ModelHandle) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(V,) bool each: the token holds more than white space; it holds a line break; it holds one behind other text."""
    if "line tokens" not in handle.cache:
        size = handle.model.get_input_embeddings().num_embeddings
        texts = handle.tokenizer.batch_decode([[i] for i in range(min(size, len(handle.tokenizer)))], skip_special_tokens=True)
        texts = [t.replace("\ufffd", "") for t in texts] + [""] * (size - len(texts))  # a part of a character may be of white space
        text, breaks = torch.tensor([bool(t.strip()) for t in texts]), torch.tensor(["\n" in t for t in texts])
        handle.cache["line tokens"] = (text, breaks, torch.tensor([t.lstrip().find("\n") > 0 for t in texts]))
    return handle.cache["line tokens"]


Decided = Callable[[str], bool]
"""Whether the text of a reply so far decides all that is wanted of it, so that it need not go on."""


class DecidedReplies:
    """A stopping criterion: a row ends where its reply is decided."""

    def __init__(self, handle: ModelHandle, decided: Sequence[Decided], start: int) -> None:
        self._handle, self._decided, self._start = handle, decided, start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = self._handle.tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        return torch.tensor([d(t) for d, t in zip(self._decided, texts)], device=input_ids.device)


def end_tokens(handle: ModelHandle) -> list[int]:
    """The tokens that end a generation: the tokenizer's and those of the checkpoint."""
    own = handle.model.generation_config.eos_token_id
    return sorted({handle.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None})


@contextmanager
def greedy_decoding(handle: ModelHandle, ends: bool = True) -> Iterator[None]:
    """Greedy decoding in the place of a checkpoint's own settings (sampling, penalties, beams); its end tokens are kept unless
    `ends` is false: then every row has the greatest length."""
    from transformers import GenerationConfig

    owners = [m for m in handle.model.modules() if isinstance(getattr(m, "generation_config", None), GenerationConfig)]
    kept = [m.generation_config for m in owners]
    end = end_tokens(handle) if ends else None
    plain = GenerationConfig(do_sample=False, num_beams=1, eos_token_id=end, pad_token_id=handle.tokenizer.pad_token_id)
    try:
        for m in owners:
            m.generation_config = plain
        yield
    finally:
        for m, config in zip(owners, kept):
            m.generation_config = config
