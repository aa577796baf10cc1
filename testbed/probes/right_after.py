"""Right after each edit: did it take, and does it reach a paraphrase and a new picture?"""

from __future__ import annotations

from testbed.core.registry import PROBES
from testbed.probes.base import Moment, Past, Planned, Probe, ask_splits


@PROBES.register("right_after")
class RightAfter(Probe):
    """Every edit of a step, once the step is made."""

    summary = "the edit, one paraphrase and one new picture of it, right after its step"
    version = 1

    def ask(self, past: Past, moment: Moment) -> list[Planned]:
        new = [(a, 1.0) for a in past.new]
        return ask_splits(past, new, ("edit", "text_generality", "image_generality"), "immediate")
