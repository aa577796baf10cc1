"""What a model writes when it goes on from a prompt about an edited subject: fluency and consistency of the papers of ROME.

Meng et al. 2022 (ROME, section 3.4) sample about 100 tokens behind each of a record's generation prompts, of the five likeliest at
each position, and measure the entropy of the n-grams (`analysis.metrics.generation_entropy`) and the likeness to texts about
subjects that truly have the new value (`analysis.metrics.reference_score`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from testbed.core.events import Question
from testbed.core.registry import PROBES
from testbed.probes.base import Applied, Checkpoint, EditHistory, Planned, Probe, by_age, of_split

PROMPTS = 10
"""Most prompts of one edit, which is the number of generation prompts of a record of CounterFact."""


@PROBES.register("generation")
class Generation(Probe):
    """16 live edits (32 at the end), each with its generation prompts, which the model goes on from by sampling.

    Where a record has none, the edit's own prompt and its held-out paraphrases stand in, and a note says so.
    """

    summary = "sampled texts about edited subjects: generation entropy (fluency) and reference score (consistency)"
    version = 1
    default = False

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        if not checkpoint.full:
            return []
        edits = by_age(history, checkpoint, history.size(32 if "end" in checkpoint.reasons else 16), "edit")
        return [Planned(q, "age_mixed", edit, p) for edit, p in edits for q in sampled_questions(history, edit)]

    def notes(self, asked: Sequence[Planned]) -> list[str]:
        edits = {p.edit.event.id for p in asked if p.edit}
        standing = {p.edit.event.id for p in asked if p.edit and p.question.prompt == p.edit.event.prompt}
        if not standing:
            return []
        own = "the edit's own prompt and its paraphrases stand in"
        return [f"generation: {len(standing)} of {len(edits)} edits have no generation prompts in their records: {own}"]


def sampled_questions(history: EditHistory, edit: Applied) -> list[Question]:
    """The prompts from which the model goes on, each with the edit's value as the answer that the text should be about."""
    prompts = of_split(history, edit, "generation", PROMPTS)
    if not prompts:
        prompts = [*of_split(history, edit, "edit"), *of_split(history, edit, "text_generality", PROMPTS - 1)]
    return [replace(q, split="generation", scoring="sample", id="") for q in prompts]
