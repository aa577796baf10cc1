"""Asked to choose between its old and its new answer, which one does the edited model hold to be right?

Two-choice self-assessment (SA-MCQ, arXiv 2604.05995): editors that score 99 % on the edit itself often fall here, which the
authors call surface compliance. Both orders of the options are asked, so that a model that prefers a letter scores one half.
"""

from __future__ import annotations

from testbed.core.events import Question
from testbed.core.registry import PROBES
from testbed.probes.base import Applied, Checkpoint, EditHistory, Planned, Probe, ask_where_replaced

LETTERS = ("A", "B", "C")
UNCERTAIN = "uncertain"
"""The third option."""


@PROBES.register("self-assessment")
class SelfAssessment(Probe):
    """24 live edits (48 at the end) whose old answer is known, four questions each: two orders, with and without "uncertain"."""

    summary = "old against new answer as options, in both orders, with and without the option uncertain (SA-MCQ)"
    version = 1
    default = False

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        return ask_where_replaced(history, checkpoint, assessments)


def assessments(edit: Applied) -> list[Question]:
    """The four questions; the answer is the letter of the new answer, and the number of choices tells whether "uncertain" is one."""
    e, out = edit.event, []
    for options in ((e.previous, e.target), (e.target, e.previous)):
        for shown in (options, (*options, UNCERTAIN)):
            letters = LETTERS[: len(shown)]
            lines = [f"{letter}. {option}" for letter, option in zip(letters, shown)]
            prompt = "\n".join([e.prompt, *lines, "Answer:"])
            right = letters[shown.index(e.target)]
            out.append(Question("self_assessment", prompt, right, e.id, e.image, choices=letters, scoring="sum"))
    return out
