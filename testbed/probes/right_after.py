"""Right after each edit: did it take, and does it reach a paraphrase and a new picture?"""

from __future__ import annotations

from testbed.core.registry import PROBES
from testbed.probes.base import Checkpoint, EditHistory, Planned, Probe, ask_splits


@PROBES.register("right_after")
class RightAfter(Probe):
    """Every edit of a step, once the step is made."""

    summary = "the edit, one paraphrase and one new picture of it, right after its step"
    version = 1

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        new = [(a, 1.0) for a in history.new]
        return ask_splits(history, new, ("edit", "text_generality", "image_generality"), "immediate")
