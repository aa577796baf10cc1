"""The teacher-forced score of an answer, read from a free generation for as long as it follows the answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

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
