"""Is a corrected fact known from every side? The faces that HalluEditBench asks beside efficacy, paraphrases and locality."""

from __future__ import annotations

from testbed.core.registry import PROBES
from testbed.probes.base import Checkpoint, EditHistory, Planned, Probe, ask_splits, by_age

NUMBERS = {
    "generality_yes_no": 2,
    "generality_choice": 1,
    "generality_reversed": 1,
    "portability_3hop": 1,
    "portability_4hop": 1,
    "portability_5hop": 1,
    "portability_6hop": 1,
    "robustness": 2,
}
"""How many questions of each split are asked about an edit: both of a pair of which one answer is yes and the other no."""


@PROBES.register("faces")
class Faces(Probe):
    """32 live edits (64 at the end), from each side that the stream asks about: yes or no, choices, reversed, 3 to 6 hops, doubt.

    Huang, Chen and Shu 2025 (HalluEditBench, section 2.3). Asked of streams with such questions alone.
    """

    summary = "a fact from other sides: yes or no, choices, reversed, 3 to 6 hops, after a doubt (HalluEditBench)"
    version = 1

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        if not checkpoint.full:
            return []
        n = history.size(64 if "end" in checkpoint.reasons else 32)
        found = ((split, number, by_age(history, checkpoint, n, split)) for split, number in NUMBERS.items())
        return [q for split, number, edits in found for q in ask_splits(history, edits, (split,), "age_mixed", number)]
