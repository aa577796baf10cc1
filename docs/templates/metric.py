"""ANSWER-WORDS: how long the free answers to edited questions are. An edited model that falls into repetition writes more.

Replace this text by what the metric says about a model, and by its formula.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.metrics.answers import at_end
from analysis.metrics.plugin import AnswerMetric, generated_texts
from analysis.reading.load import EditorRun, Run
from testbed.core.registry import METRICS


@METRICS.register("answer_words")
class AnswerWords(AnswerMetric):
    """The mean number of words in a free answer to the question of a live edit, at the end of the run."""

    summary = "Words of a free answer to an edited question"
    short = "Words"
    unit = "count"
    better = -1

    def answers(self, run: Run, editor: EditorRun) -> pd.DataFrame:
        """Which answers count: here those of the last step that asked about edits."""
        return at_end(editor.records, "edit")

    def values(self, run: Run, editor: EditorRun, rows: pd.DataFrame) -> np.ndarray:
        """A number for each answer, nan where it was not measured."""
        return np.array([np.nan if text is None else len(text.split()) for text in generated_texts(editor, rows)])
