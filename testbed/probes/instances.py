"""Do the instances of a concept follow its edited definition, and do the others stay?"""

from __future__ import annotations

from testbed.core.registry import PROBES
from testbed.probes.base import Checkpoint, EditHistory, Planned, Probe, ask_splits, by_age

SPLITS = ("instance_follow", "instance_stay")
"""Instances whose membership the edit changes, and those whose membership stays."""
NUMBER = 2
"""Questions of each split about an edit."""


@PROBES.register("instances")
class Instances(Probe):
    """32 live edits (64 at the end), two instances of each that must follow and two that must stay. Asked of concepts alone.

    Wang et al. 2024 (ConceptEdit, arXiv 2403.06259, Instance Change).
    """

    summary = "instances of a concept whose definition was edited: those that must follow, those that must stay (ConceptEdit)"
    version = 1

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        if not checkpoint.full:
            return []
        n = history.size(64 if "end" in checkpoint.reasons else 32)
        found = ((split, by_age(history, checkpoint, n, split)) for split in SPLITS)
        return [q for split, edits in found for q in ask_splits(history, edits, (split,), "age_mixed", NUMBER)]
