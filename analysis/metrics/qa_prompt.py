"""Success behind the instruction to answer a question (probe `qa-prompt`), in every scoring mode: the WILD protocol, arXiv 2502.11177."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pandas as pd

from analysis.metrics.answers import at_end
from analysis.metrics.plugin import AnswerMetric
from analysis.reading.load import EditorRun, Run
from analysis.reading.records import SCORES
from testbed.core.registry import METRICS


class _InstructedSuccess(AnswerMetric):
    """Mean score at the end over the answers of one split, in [0, 1]; absent without the probe."""

    split: ClassVar[str]
    better = 1
    modes = True

    def answers(self, run: Run, editor: EditorRun) -> pd.DataFrame:
        return at_end(editor.records, self.split)

    def values(self, run: Run, editor: EditorRun, rows: pd.DataFrame) -> np.ndarray:
        return rows[SCORES].to_numpy(float)


@METRICS.register("qa_success")
class QaSuccess(_InstructedSuccess):
    summary = "Edit success behind the instruction to answer a question"
    short = "Success, QA prompt"
    split = "qa_edit"


@METRICS.register("qa_generality")
class QaGenerality(_InstructedSuccess):
    summary = "Text generality behind the instruction to answer a question"
    short = "Generality, QA prompt"
    split = "qa_generality"
