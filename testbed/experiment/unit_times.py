"""Seconds of one piece of each kind of work on a model: a forward, a training step, an optimiser step, a solve, a question.

Each piece is timed once or twice on real prompts and scaled by counts, so that a dry run makes no edit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from testbed.core.events import EditEvent, Question
from testbed.experiment.answering import answer_base
from testbed.model.encoding import answer_ids, collate
from testbed.model.handle import ModelHandle
from testbed.model.suffix import ModelSuffix, suffix_from_layer

ROWS, LAYERS = 4, 2
"""Rows and layers of the larger of two measurements between which, and beyond which, time is a straight line."""
TOGETHER = (8, 32)
"""Fewest and most questions of the larger of two timed groups."""
GENERATED = 16
"""Tokens of the longest answer that is timed; longer ones go on by the line through one token and so many."""
_QUICK = 0.3
"""Seconds under which a piece is timed a second time, because the first pass includes one-time costs."""
_ORDER, _NUMBERS = 512, 500_000
"""Order of the system and size of the tensor that are timed; larger ones are scaled."""
_EIGEN = 12.0
"""Work of a symmetric eigendecomposition, in solves of the same order."""


class UnitTimes:
    """Times on a model, with rows (prompt and answer) of some edits."""

    def __init__(self, handle: ModelHandle, events: Sequence[EditEvent]) -> None:
        edits = [e for e in events if e.target][:: max(1, len(events) // ROWS)][:ROWS]
        self.handle, self.device = handle, handle.device
        asks, targets = [e.ask() for e in edits], [e.target for e in edits]
        tokens = [answer_ids(handle, a, x) for a, x in zip(asks, targets)]
        self._batches = [collate(handle, asks[:n], tokens[:n], end=True) for n in (1, len(asks))]
        self._sizes = [1, len(asks)]
        texts = [handle.tokenizer(f"{a.prompt} {x}")["input_ids"] for a, x in zip(asks, targets)]
        self.fact_tokens = sum(map(len, texts)) / max(1, len(texts))
        """Mean length of an edit's text with its answer, in tokens."""
        self._layers = min(LAYERS, handle.n_layers)
        self._suffixes: dict[int, ModelSuffix] = {}
        forward = [self._seconds(lambda i=i: self._read(i)) for i in (0, 1)]
        step = [[self._seconds(lambda i=i, n=n: self._train(i, n)) for n in (0, self._layers)] for i in (0, 1)]
        self._forward_line = _line(self._sizes, forward)
        self._head_line = _line(self._sizes, [s[0] for s in step])
        self._layer_line = _line(self._sizes, [max(0.0, s[1] - s[0]) / self._layers for s in step])
        self.token = forward[1] / int((self._batches[1].prompt | self._batches[1].answer).sum())
        """Seconds of one more token of a prompt."""

    def forward(self, rows: float) -> float:
        """Seconds of reading so many rows once."""
        return self._forward_line(rows)

    def step(self, rows: float, layers: float) -> float:
        """Seconds of one forward and backward of rows through the highest layers and the head."""
        return self._head_line(rows) + layers * self._layer_line(rows)

    @cached_property
    def number(self) -> float:
        """Seconds of one Adam step for each number that it moves."""
        weight = torch.zeros(_NUMBERS, device=self.device, requires_grad=True)
        weight.grad = torch.ones_like(weight)
        adam = torch.optim.Adam([weight], fused=True)
        return self._seconds(adam.step) / _NUMBERS

    def solve(self, order: int) -> float:
        """Seconds of one dense solve of this order in float64; by the cube of the order."""
        return self._solve * (order / _ORDER) ** 3

    def eigen(self, order: int) -> float:
        """Seconds of one symmetric eigendecomposition of this order."""
        return _EIGEN * self.solve(order)

    @cached_property
    def _solve(self) -> float:
        a = torch.eye(_ORDER, dtype=torch.float64, device=self.device) + 0.1
        return self._seconds(lambda: torch.linalg.solve(a, a))

    def questions(self, asked: Sequence[Question], max_new_tokens: int, seconds: float) -> Callable[[float], float]:
        """Seconds of n questions that are asked together, from a group of two and one that takes about these seconds.

        Answers longer than `GENERATED` tokens are counted at their full length, at which a model that stops sooner takes less.
        """

        def timed(n: int, tokens: int) -> float:
            part = asked[:: max(1, len(asked) // n)][:n]
            return self._once(lambda: answer_base(self.handle, part, tokens))

        def group(n: int) -> float:
            seconds = timed(n, min(max_new_tokens, GENERATED))
            if max_new_tokens <= GENERATED:
                return seconds
            return _line([1, GENERATED], [timed(n, 1), seconds])(max_new_tokens)

        few = min(2, len(asked))
        timed(few, 1)  # one-time costs
        small = group(few)
        many = min(len(asked), max(TOGETHER[0], min(TOGETHER[1], round(seconds / small * few))))
        return _line([few, many], [small, group(many)])

    def _read(self, i: int) -> None:
        self._suffixes[i] = suffix_from_layer(self.handle, self._batches[i], self.handle.n_layers - self._layers)

    def _train(self, i: int, layers: int) -> None:
        suffix, n = self._suffixes[i], self.handle.n_layers
        hidden = suffix.hidden.detach().clone().requires_grad_(True)
        loss = suffix.answer_losses(suffix.final_hidden(suffix.run(hidden, n - layers))).sum()
        torch.autograd.grad(loss, hidden)

    def _seconds(self, work: Callable[[], object]) -> float:
        first = self._once(work)
        return min(first, self._once(work)) if first < _QUICK else first

    def _once(self, work: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _line(at: Sequence[int], values: Sequence[float]) -> Callable[[float], float]:
    """The straight line through two measurements, with no negative slope; of one point a line through zero."""
    (a, b), (x, y) = at, values
    if a == b:
        return lambda n: x * n / a
    slope = max(0.0, (y - x) / (b - a))
    return lambda n: max(x + slope * (n - a), 0.0)
