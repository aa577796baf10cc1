"""Does the old answer come back when an edit is asked behind text that has nothing to do with it?

Facts that an edit seems to have replaced resurface under other prompts (arXiv 2606.23276). Each of five sentences stands before the
edit's own question, and the answer is judged by the value before the edit: a hit is the old answer.
"""

from __future__ import annotations

from dataclasses import replace

from testbed.core.events import Question
from testbed.core.registry import PROBES
from testbed.probes.base import Applied, Checkpoint, EditHistory, Planned, Probe, ask_where_replaced, of_split

PREFIXES = (
    "The weather was fine, and the market opened at eight.",
    "She put the letter on the table and closed the window.",
    "Most trains on this line stop for about two minutes.",
    "He had never cooked for so many people before.",
    "A glass of water stood beside the lamp all night.",
)
"""Sentences that no fact of a stream is about."""


@PROBES.register("persistence")
class Persistence(Probe):
    """24 live edits (48 at the end) whose old answer is known, each behind all five sentences."""

    summary = "edits behind five foreign sentences, judged by the old answer (a hit is a relapse)"
    version = 1
    default = False

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        return ask_where_replaced(history, checkpoint, lambda edit: behind_prefixes(history, edit))


def behind_prefixes(history: EditHistory, edit: Applied) -> list[Question]:
    """The edit's question behind each sentence, with the old answer, and its aliases where the stream asks for the stale value."""
    (own,), stale = of_split(history, edit, "edit"), of_split(history, edit, "stale")
    golds = stale[0].golds if stale else (edit.event.previous or "",)
    old = replace(own, split="persistence", answer=golds[0], aliases=golds[1:], id="")
    return [replace(old, prompt=f"{prefix} {own.prompt}", id="") for prefix in PREFIXES]
