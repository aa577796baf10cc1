"""How an edit ages: a tenth of the edits, asked again at ages 0, 1, 2, 4, 8, ... edits."""

from __future__ import annotations

from testbed.core.registry import PROBES
from testbed.probes.base import Applied, Checkpoint, EditHistory, Planned, Probe, ask_splits, draw

SHARE = 0.1
"""Share of the edits that belong to the cohort, before the budget."""


@PROBES.register("ladder")
class Ladder(Probe):
    """Live edits whose draw is under a tenth, each asked at the first step by which it has reached one of the ages.

    The id alone decides whether an edit belongs to the cohort, and a smaller budget takes a part of the same edits.
    An age is the number of edits made after the edit itself; where a batch passes several ages in one step, the
    question is asked once.
    """

    summary = "a tenth of the edits at ages 0, 1, 2, 4, 8, ... edits: retention by age"
    version = 1

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        share = min(1.0, SHARE * history.scale)
        cohort = (a for a in history.live if _due(a, checkpoint) and draw(history.seed, "ladder", a.event.id) < share)
        return ask_splits(history, [(a, share) for a in cohort], ("edit",), "cohort_ladder")


def _due(edit: Applied, checkpoint: Checkpoint) -> bool:
    """True where the edit's age reaches 0, or reaches or passes a power of two, at this step."""
    now, before = checkpoint.edits - edit.position, checkpoint.before - edit.position
    return before < 0 or now.bit_length() > before.bit_length()
