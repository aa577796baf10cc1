"""Edits as numbered rows, which is how a sequence with a picture passes through plug-ins that know images and classes.

A row's number is the `x` of a sample, its answer's tokens are the `y`. `AnswerModel` maps numbers to logits at the
answer's positions, so `model(x)` means what plug-ins take it to mean, and no picture is decoded before its row is run.
Only the last decoder layer's down-projection is trained; what lies below it is run once a row and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from testbed.core.events import Ask
from testbed.model.encoding import Batch, answer_ids, collate
from testbed.model.handle import ModelHandle, project
from testbed.model.suffix import suffix_from_down_projection

IGNORE = -100
"""Label of a position behind the end of an answer."""
LAYER = -1
"""The layer that is trained: the last, so that nothing above it needs the other positions."""


@dataclass(frozen=True)
class Kept:
    """What training needs of one row of n answer tokens, end token included.

    act: (n, f) what enters the last down-projection where the answer is predicted. rest: (n, d) what the layer adds to
    its output. target: (n,) int64 the answer's tokens.
    """

    act: Tensor
    rest: Tensor
    target: Tensor


class Rows:
    """A growing table of prompts with their answers, numbered from 0 in order of arrival."""

    def __init__(self, handle: ModelHandle) -> None:
        self.handle = handle
        self.asks: list[Ask | None] = []
        self.answers: list[str] = []
        self._kept: dict[int, Kept] = {}

    def __len__(self) -> int:
        return len(self.asks)

    def __deepcopy__(self, memo: Any) -> Rows:
        """The same table: plug-ins copy a model to keep its weights, not its data."""
        return self

    def add(self, ask: Ask, answer: str) -> int:
        """The number of a new row. Nothing is run or decoded. Raises `BadModel` for an answer that cannot be spelled."""
        answer_ids(self.handle, ask, answer)
        self.asks.append(ask)
        self.answers.append(answer)
        return len(self) - 1

    def add_kept(self, kept: Kept) -> int:
        """The number of a new row of which only the kept activations are known."""
        self.asks.append(None)
        self.answers.append("")
        self._kept[len(self) - 1] = kept
        return len(self) - 1

    def kept(self, number: int) -> Kept:
        """The row's activations, made at the first call, always of the row alone so that they depend on no batch."""
        if number not in self._kept:
            ask = self.asks[number]
            if ask is None:
                raise KeyError(f"row {number} has no prompt")
            suffix = suffix_from_down_projection(self.handle, [ask], [self.answers[number]], LAYER)
            read = suffix.at(suffix.batch.before_answer)
            self._kept[number] = Kept(suffix.act[read], suffix.rest[read], suffix.batch.answer_ids)
        return self._kept[number]

    def labels(self, number: int) -> Tensor:
        """(n,) int64 tokens of the answer, end token included."""
        ask = self.asks[number]
        if ask is None:
            return self._kept[number].target.cpu()
        return torch.tensor([*answer_ids(self.handle, ask, self.answers[number]), self.handle.tokenizer.eos_token_id])

    def batch(self, numbers: Sequence[int] | Tensor) -> Batch:
        """Rows as right-padded inputs of the model itself, pictures decoded now; for models of one's own."""
        rows = [(ask, self.answers[int(i)]) for i in numbers if (ask := self.asks[int(i)]) is not None]
        return collate(self.handle, [ask for ask, _ in rows], [answer_ids(self.handle, *row) for row in rows], end=True)


def collate_rows(samples: Sequence[Sequence[Any]]) -> list[Tensor]:
    """Samples (number, labels, task label) as tensors (B,), (B, A) padded with -100, (B,)."""
    numbers, labels, tasks = (list(x) for x in zip(*samples))
    return [torch.stack(numbers), pad_sequence(labels, batch_first=True, padding_value=IGNORE), torch.tensor(tasks)]


class AnswerModel(nn.Module):
    """Row numbers (B,) int64 to logits (B, V, A) float32 at the positions of the answers, A the longest of them.

    Its one parameter is the float32 weight of the last down-projection; the handle's own is left as it is. Classes
    stand in dimension 1, as `torch.nn.CrossEntropyLoss` and plug-ins that take norms over classes expect.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows
        name = rows.handle.down_weight(LAYER)
        self.weight = nn.Parameter(rows.handle.parameter(name).detach().float().clone())

    def forward(self, numbers: Tensor) -> Tensor:
        handle = self.rows.handle
        kept = [self.rows.kept(int(i)) for i in numbers]
        act, rest = (pad_sequence(x, batch_first=True) for x in ([k.act for k in kept], [k.rest for k in kept]))
        hidden = rest + project(handle.down(LAYER), act, self.weight)
        return handle.head(handle.norm(hidden)).to(self.weight.device).float().transpose(1, 2)


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over rows of the mean next-token cross-entropy (nats a token) of the answer: logits (B, V, A), labels (B, A)."""
    nll = cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    return (nll.sum(1) / (labels != IGNORE).sum(1)).mean()
