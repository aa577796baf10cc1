"""Edits as numbered rows, so that plug-ins made for images and classes can train on prompts, pictures and answers.

The number of a row is the `x` of a sample, and the tokens of its answer are the `y`. `AnswerModel` maps numbers to
logits at the positions of the answer, so `model(x)` means what plug-ins expect, and a picture is decoded only when its
row is first run. Only the down-projection of the last decoder layer is trained; everything before it is run once for
each row, and its activations are kept.
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
"""Label of a position after the end of an answer."""
LAYER = -1
"""The layer that is trained: the last, because no layer above it then needs the other positions."""


@dataclass(frozen=True)
class RowActivations:
    """The activations of one row that training needs, at the n positions that predict the answer, end token included.

    act: (n, f) input of the last down-projection. rest: (n, d) everything that the layer adds to its output.
    target: (n,) int64 tokens of the answer.
    """

    act: Tensor
    rest: Tensor
    target: Tensor


class AnswerRows:
    """A growing table of prompts with their answers, numbered from 0 in order of arrival."""

    def __init__(self, handle: ModelHandle) -> None:
        self.handle = handle
        self.asks: list[Ask | None] = []
        self.answers: list[str] = []
        self.labels: list[Tensor] = []
        """(n,) int64 tokens of each answer, end token included."""
        self._activations: dict[int, RowActivations] = {}

    def __len__(self) -> int:
        return len(self.asks)

    def __deepcopy__(self, memo: Any) -> AnswerRows:
        """The same table, because plug-ins that copy a model want its weights and not its data."""
        return self

    def add(self, ask: Ask, answer: str) -> int:
        """Add a row and return its number; nothing is run or decoded. Raises `BadModel` for an answer that cannot be tokenized."""
        return self._append(ask, answer, torch.tensor([*answer_ids(self.handle, ask, answer), self.handle.tokenizer.eos_token_id]))

    def add_activations(self, activations: RowActivations) -> int:
        """Add a row of which only the activations are known, and return its number."""
        self._activations[len(self)] = activations
        return self._append(None, "", activations.target.cpu())

    def _append(self, ask: Ask | None, answer: str, labels: Tensor) -> int:
        self.asks.append(ask)
        self.answers.append(answer)
        self.labels.append(labels)
        return len(self) - 1

    def activations(self, number: int) -> RowActivations:
        """The activations of a row. The first call computes them from the row alone, so that they depend on no batch."""
        if number not in self._activations and (ask := self.asks[number]) is not None:
            suffix = suffix_from_down_projection(self.handle, [ask], [self.answers[number]], LAYER)
            read = suffix.at(suffix.batch.before_answer)
            self._activations[number] = RowActivations(suffix.act[read], suffix.rest[read], suffix.batch.answer_ids)
        return self._activations[number]

    def batch(self, numbers: Sequence[int] | Tensor) -> Batch:
        """Rows as right-padded inputs of the model itself, with their pictures decoded; for a module of your own."""
        rows = [(ask, self.labels[int(i)][:-1].tolist()) for i in numbers if (ask := self.asks[int(i)]) is not None]
        return collate(self.handle, [ask for ask, _ in rows], [ids for _, ids in rows], end=True)


def collate_rows(samples: Sequence[Sequence[Any]]) -> list[Tensor]:
    """Samples (number, labels, task label) as tensors (B,), (B, A) padded with -100, (B,)."""
    numbers, labels, tasks = (list(x) for x in zip(*samples))
    return [torch.stack(numbers), pad_sequence(labels, batch_first=True, padding_value=IGNORE), torch.tensor(tasks)]


class AnswerModel(nn.Module):
    """Row numbers (B,) int64 to logits (B, V, A) float32 at the positions of the answers, A the longest of them.

    Its one parameter is a float32 copy of the weight of the last down-projection, so the model of the handle does not
    change. Dimension 1 is that of the classes, as `torch.nn.CrossEntropyLoss` and the plug-ins expect.
    """

    def __init__(self, rows: AnswerRows) -> None:
        super().__init__()
        self.rows = rows
        name = rows.handle.down_weight(LAYER)
        self.weight = nn.Parameter(rows.handle.parameter(name).detach().float().clone())

    def forward(self, numbers: Tensor) -> Tensor:
        handle = self.rows.handle
        rows = [self.rows.activations(int(i)) for i in numbers]
        act, rest = (pad_sequence(x, batch_first=True) for x in ([r.act for r in rows], [r.rest for r in rows]))
        hidden = rest + project(handle.down(LAYER), act, self.weight)
        return handle.logits(handle.norm(hidden)).to(self.weight.device).float().transpose(1, 2)


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over rows of the mean next-token cross-entropy (nats a token) of the answer: logits (B, V, A), labels (B, A)."""
    nll = cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    return (nll.sum(1) / (labels != IGNORE).sum(1)).mean()
