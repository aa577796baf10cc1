"""Success behind the instruction to answer a question (probe `qa-prompt`), in every scoring mode: the WILD protocol, arXiv 2502.11177."""

from __future__ import annotations

from analysis.metrics.plugin import SplitSuccess
from testbed.core.registry import METRICS


@METRICS.register("qa_success")
class QaSuccess(SplitSuccess):
    summary = "Edit success behind the instruction to answer a question"
    short = "Success, QA prompt"
    split = "qa_edit"


@METRICS.register("qa_generality")
class QaGenerality(SplitSuccess):
    summary = "Text generality behind the instruction to answer a question"
    short = "Generality, QA prompt"
    split = "qa_generality"
