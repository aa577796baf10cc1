"""Do edits reach paraphrases and new pictures?"""

from __future__ import annotations

from testbed.core.registry import PROBES
from testbed.probes.base import Moment, Past, Planned, Probe, ask_by_age


@PROBES.register("generality")
class Generality(Probe):
    """64 live edits (128 at the end), a held-out paraphrase and a new picture of each."""

    summary = "held-out paraphrases and new pictures of live edits"
    version = 2

    def ask(self, past: Past, moment: Moment) -> list[Planned]:
        if not moment.full:
            return []
        n = past.size(128 if "end" in moment.reasons else 64)
        return ask_by_age(past, moment, n, ("text_generality", "image_generality"))
