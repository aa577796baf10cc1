"""Does an edit answer where a user asks it as a question, behind an instruction, as in the WILD protocol?

Yang et al. 2025 (The Mirage of Model Editing, arXiv 2502.11177) ask edited models once without context and once behind an
instruction, and let them answer freely up to a natural stop. The usual probes ask without context.
"""

from __future__ import annotations

from dataclasses import replace

from testbed.core.events import Split
from testbed.core.registry import PROBES
from testbed.probes.base import Checkpoint, EditHistory, Planned, Probe, ask_at_full

TEMPLATE = "Please answer the question:\n\nQ: {}\nA:"
"""The instruction around a prompt."""
SPLITS: dict[Split, Split] = {"edit": "qa_edit", "text_generality": "qa_generality"}
"""Split of a question to that of the same question behind the instruction."""


@PROBES.register("qa-prompt")
class QaPrompt(Probe):
    """48 live edits (96 at the end) with one paraphrase each, behind the instruction."""

    summary = "edits and paraphrases behind the instruction to answer a question (WILD)"
    version = 1
    default = False

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        return [_with_instruction(plan) for plan in ask_at_full(history, checkpoint, 48, SPLITS)]


def _with_instruction(plan: Planned) -> Planned:
    question = plan.question
    asked = replace(question, split=SPLITS[question.split], prompt=TEMPLATE.replace("{}", question.prompt), id="")
    return replace(plan, question=asked)
