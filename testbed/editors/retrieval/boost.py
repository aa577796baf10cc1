"""A boost of a stored answer's tokens: CARML's correction of logits (NeurIPS 2025, OpenReview hdJXzKZjY9), as a context of a batch.

The logits of all tokens of the answer, and of the end token, are raised by one number at every position. It is the same for scores and
for generation. It pastes the stored answer, whatever the model made of the fact, so that a number with it says little of the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from testbed.core.events import Ask
from testbed.model.encoding import Batch, answer_ids
from testbed.model.handle import ModelHandle


class AnswerBoost:
    """amount: what is added to logits (before a cap on them, which some families have behind the head)."""

    def __init__(self, handle: ModelHandle, amount: float) -> None:
        self.handle, self.amount = handle, amount / handle.logit_form.factor
        self._tokens: dict[tuple[str, str], list[int]] = {}

    def remember(self, ask: Ask, answer: str) -> None:
        """Boost this answer wherever the prompt is asked, until another answer is remembered for it."""
        end = self.handle.tokenizer.eos_token_id
        self._tokens[_key(ask)] = sorted({*answer_ids(self.handle, ask, answer), *([] if end is None else [end])})

    @contextmanager
    def around(self, batch: Batch) -> Iterator[None]:
        """Raise the logits of each row of a batch; rows of no known prompt are left as they are."""
        rows = [self._tokens.get(_key(a), []) for a in batch.asks]
        if not any(rows):
            yield
            return
        with self.handle.hooked(self.handle.head, lambda m, args, logits: self._raised(logits, rows)):
            yield

    def _raised(self, logits: Tensor, rows: list[list[int]]) -> Tensor:
        """(B, T, V) logits, or beams of them, raised where each row's answer has its tokens."""
        more: Any = torch.zeros(len(rows), logits.shape[-1], dtype=logits.dtype, device=logits.device)
        for i, tokens in enumerate(rows):
            more[i, tokens] = self.amount
        return logits + more.repeat_interleave(len(logits) // len(rows), 0)[:, None]


def _key(ask: Ask) -> tuple[str, str]:
    return ask.prompt, ask.image.key if ask.image is not None else ""
