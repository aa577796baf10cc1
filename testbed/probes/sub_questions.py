"""Is what an edited document says known one by one?"""

from __future__ import annotations

from testbed.core.registry import PROBES
from testbed.probes.base import Checkpoint, EditHistory, Planned, Probe, ask_at_full


@PROBES.register("sub-questions")
class SubQuestions(Probe):
    """64 live edits (128 at the end), one short question of each about what its document says. Asked of documents alone."""

    summary = "short questions about what an edited document says"
    version = 1

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        return ask_at_full(history, checkpoint, 64, ("sub_question",))
