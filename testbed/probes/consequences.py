"""Consequences of an edit that the model should infer, and outdated answers that it should no longer give."""

from __future__ import annotations

from testbed.core.registry import PROBES
from testbed.probes.base import Checkpoint, EditHistory, Planned, Probe, ask_at_full


@PROBES.register("portability")
class Portability(Probe):
    """48 live edits (96 at the end), one consequence of each."""

    summary = "consequences of edits: the fact reached by another way than it was edited"
    version = 2

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        return ask_at_full(history, checkpoint, 48, ("portability",))


@PROBES.register("stale")
class Stale(Probe):
    """48 live edits (96 at the end), each judged by the value that it replaced."""

    summary = "does the model still say what was true before the edit? (a hit is a stale answer)"
    version = 2

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        return ask_at_full(history, checkpoint, 48, ("stale",))
