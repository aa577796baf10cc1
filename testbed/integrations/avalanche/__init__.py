# ruff: noqa: E402, F401  (`load_avalanche` must import Avalanche before any other import does; the imports are what this package offers)
"""Avalanche in both directions: a stream of edits as a benchmark, an editor as a strategy, and strategies that learn answers.

    from testbed.integrations.avalanche import EditorStrategy, answer_strategy, edit_benchmark

Importing this package imports Avalanche, and raises ImportError with the line that installs it where it is missing. In
the testbed's own loop the strategies are editors (`--editor avalanche:replay`). See docs/avalanche.md.
"""

from __future__ import annotations

from testbed.editors.continual.methods import load_avalanche

load_avalanche()

from testbed.editors.continual._strategies import answer_strategy, dataset_of, seeded
from testbed.editors.continual.rows import AnswerModel, AnswerRows, answer_loss
from testbed.integrations.avalanche.benchmark import EditBenchmark, EditExperience, EvalItem, edit_benchmark
from testbed.integrations.avalanche.editing import EditorStrategy
from testbed.integrations.avalanche.metrics import answer_metrics
