"""Do edits reach paraphrases and new pictures?"""

from __future__ import annotations

from testbed.core.registry import PROBES
from testbed.probes.base import Checkpoint, EditHistory, Planned, Probe, ask_at_full


@PROBES.register("generality")
class Generality(Probe):
    """64 live edits (128 at the end), a held-out paraphrase and a new picture of each."""

    summary = "held-out paraphrases and new pictures of live edits"
    version = 2

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        return ask_at_full(history, checkpoint, 64, ("text_generality", "image_generality"))
