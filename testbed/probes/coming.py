"""What does editing do to facts that are edited later? The next year's edits, asked before they are made."""

from __future__ import annotations

from testbed.core.registry import PROBES
from testbed.probes.base import Checkpoint, EditHistory, Planned, Probe, ask_splits, draw

SHARE = 0.25
"""Share of the edits that belong to the panel, before the budget."""


@PROBES.register("coming")
class Coming(Probe):
    """At each year's end, a quarter of the next year's edits of facts that no edit has touched yet.

    The difference from the unedited model on the same questions is forward transfer (Lopez-Paz and Ranzato 2017).
    Edits that replace an earlier one are left out, because the earlier one has taught their present answer.
    The id alone decides whether an edit belongs to the panel, and the editor sees the question and nothing else of it.
    """

    summary = "a quarter of the next year's edits, before they are made: forward transfer"
    version = 1

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        if "year" not in checkpoint.reasons or not history.coming:
            return []
        share, year = min(1.0, SHARE * history.scale), history.coming[0].event.year
        first = (a for a in history.coming if a.event.year == year and a.event.revises is None)
        return ask_splits(
            history, [(a, share) for a in first if draw(history.seed, "coming", a.event.id) < share], ("edit",), "coming_year"
        )
