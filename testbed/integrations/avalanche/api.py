# ruff: noqa: E402  (`load` imports Avalanche before anything else does)
"""Avalanche, both ways: a stream of edits as a benchmark, an editor as a strategy, and strategies that learn answers.

    from testbed.integrations.avalanche.api import EditorStrategy, answer_strategy, edit_benchmark

Importing this imports Avalanche. See docs/avalanche.md; in the testbed's own loop the strategies are editors,
`--editor avalanche:replay` and its like.
"""

from __future__ import annotations

from testbed.editors.continual.methods import load

load()

from testbed.editors.continual._carriers import answer_strategy
from testbed.editors.continual._strategies import dataset_of, seeded
from testbed.editors.continual.rows import AnswerModel, Rows, answer_loss
from testbed.integrations.avalanche.benchmark import EditBenchmark, EditExperience, Item, edit_benchmark
from testbed.integrations.avalanche.editing import EditorStrategy
from testbed.integrations.avalanche.metrics import answer_metrics

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
