"""How an edit ages: a tenth of the edits, asked again at ages 0, 1, 2, 4, 8, ... edits."""

from __future__ import annotations

from testbed.core.registry import PROBES
from testbed.probes.base import Applied, Moment, Past, Planned, Probe, ask_splits, draw

SHARE = 0.1
"""Share of the edits that belong to the cohort, before the budget."""


@PROBES.register("ladder")
class Ladder(Probe):
    """Edits whose draw is under a tenth, for as long as they are live, each at the first step by which it has reached an age.

    Whether an edit belongs is decided by its id alone, and a smaller budget takes a part of the same edits. An
    age counts edits from the edit's own place in the stream; a batch passes several ages in one step and is
    asked once.
    """

    summary = "a tenth of the edits at ages 0, 1, 2, 4, 8, ... edits: retention by age"
    version = 1

    def ask(self, past: Past, moment: Moment) -> list[Planned]:
        share = min(1.0, SHARE * past.scale)
        cohort = (a for a in past.live if _due(a, moment) and draw(past.seed, "ladder", a.event.id) < share)
        return ask_splits(past, [(a, share) for a in cohort], ("edit",), "cohort_ladder")


def _due(edit: Applied, moment: Moment) -> bool:
    """True where this step takes the edit to age 0 or to, or past, a power of two."""
    now, before = moment.edits - edit.position, moment.before - edit.position
    return before < 0 or now.bit_length() > before.bit_length()
