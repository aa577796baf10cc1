# ruff: noqa: E402  (`load` imports Avalanche before anything else does)
"""Avalanche, both ways: a stream of edits as a benchmark, an editor as a strategy, and strategies that learn answers.

    from testbed.bridges.avalanche import EditorStrategy, answer_strategy, edit_benchmark

Importing this imports Avalanche. See docs/avalanche.md; in the testbed's own loop the strategies are editors,
`--editor avalanche:replay` and its like.
"""

from __future__ import annotations

from testbed.bridges._avalanche_methods import load

load()

from testbed.bridges._avalanche_benchmark import EditBenchmark, EditExperience, Item, edit_benchmark
from testbed.bridges._avalanche_carriers import answer_strategy
from testbed.bridges._avalanche_editing import EditorStrategy
from testbed.bridges._avalanche_metrics import answer_metrics
from testbed.bridges._avalanche_rows import AnswerModel, Rows, answer_loss
from testbed.bridges._avalanche_strategies import dataset_of, seeded

__all__ = [
    "AnswerModel",
    "EditBenchmark",
    "EditExperience",
    "EditorStrategy",
    "Item",
    "Rows",
    "answer_loss",
    "answer_metrics",
    "answer_strategy",
    "dataset_of",
    "edit_benchmark",
    "seeded",
]
