"""Avalanche's own metrics for answers of several tokens: a sample is right when every token of its answer is right."""

from __future__ import annotations

from typing import Any

import torch
from avalanche.evaluation.metrics import accuracy_metrics, bwt_metrics, forgetting_metrics, forward_transfer_metrics
from torch import Tensor

from testbed.editors.continual.rows import IGNORE


class _GradedStrategy:
    """A strategy whose outputs are 1 for a right answer and 0 for a wrong one, and whose labels are 1."""

    eval_every = 0
    """The forward-transfer metric reads this schedule of evaluations; the caller evaluates here."""

    def __init__(self, strategy: Any) -> None:
        self._strategy = strategy

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)

    @property
    def mb_output(self) -> Tensor:
        y = self._strategy.mb_y
        return ((self._strategy.mb_output.argmax(1) == y) | (y == IGNORE)).all(1).long()

    @property
    def mb_y(self) -> Tensor:
        return torch.ones(len(self._strategy.mb_y), dtype=torch.long, device=self._strategy.mb_y.device)


def answer_metrics(forward_transfer: bool = False) -> list[Any]:
    """Accuracy, forgetting and backward transfer of an experience and of the stream, under Avalanche's names.

    They read exact match under teacher forcing, where Avalanche's own would take the positions of an answer for classes.
    They are for strategies over `AnswerModel`; `EditorStrategy` takes Avalanche's own metrics. Forward transfer needs
    one `eval` before any training.
    """
    makers = [accuracy_metrics, forgetting_metrics, bwt_metrics, *([forward_transfer_metrics] if forward_transfer else [])]
    return [_graded(metric) for make in makers for metric in make(experience=True, stream=True)]


def _graded(metric: Any) -> Any:
    iteration, end = metric.after_eval_iteration, metric.after_eval
    metric.after_eval_iteration = lambda strategy: iteration(_GradedStrategy(strategy))
    metric.after_eval = lambda strategy: end(_GradedStrategy(strategy))
    return metric
