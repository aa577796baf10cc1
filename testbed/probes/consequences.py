"""What an edit should change besides itself, and what it should make the model stop saying."""

from __future__ import annotations

from testbed.core.registry import PROBES
from testbed.probes.base import Moment, Past, Planned, Probe, ask_by_age


@PROBES.register("portability")
class Portability(Probe):
    """48 live edits (96 at the end), one consequence of each."""

    summary = "consequences of edits: the fact reached by another way than it was edited"
    version = 2

    def ask(self, past: Past, moment: Moment) -> list[Planned]:
        if not moment.full:
            return []
        n = past.size(96 if "end" in moment.reasons else 48)
        return ask_by_age(past, moment, n, ("portability",))


@PROBES.register("stale")
class Stale(Probe):
    """48 live edits (96 at the end), judged by the value that they replaced."""

    summary = "does the model still say what was true before the edit? (a hit is a stale answer)"
    version = 2

    def ask(self, past: Past, moment: Moment) -> list[Planned]:
        if not moment.full:
            return []
        n = past.size(96 if "end" in moment.reasons else 48)
        return ask_by_age(past, moment, n, ("stale",))
