"""What does editing do to facts whose turn is still to come? The next year's edits, asked before they are made."""

from __future__ import annotations

from testbed.core.registry import PROBES
from testbed.probes.base import Moment, Past, Planned, Probe, ask_splits, draw

SHARE = 0.25
"""Share of the edits that belong to the panel, before the budget."""


@PROBES.register("coming")
class Coming(Probe):
    """At each year's end, a quarter of the next year's edits of facts that no edit has touched yet.

    Set against the unedited model on the same questions this is forward transfer (Lopez-Paz and Ranzato 2017).
    Where an edit replaces an earlier one, its answer before is what the earlier one taught, so those are left out.
    Whether an edit belongs is decided by its id alone; the editor is asked the question and told nothing else.
    """

    summary = "a quarter of the next year's edits, before they are made: forward transfer"
    version = 1

    def ask(self, past: Past, moment: Moment) -> list[Planned]:
        if "year" not in moment.reasons or not past.coming:
            return []
        share, year = min(1.0, SHARE * past.scale), past.coming[0].event.year
        first = (a for a in past.coming if a.event.year == year and a.event.revises is None)
        return ask_splits(past, [(a, share) for a in first if draw(past.seed, "coming", a.event.id) < share], ("edit",), "coming_year")
