"""Are earlier edits still there? A panel of live edits stratified by age."""

from __future__ import annotations

from testbed.core.registry import PROBES
from testbed.probes.base import Moment, Past, Planned, Probe, ask_by_age


@PROBES.register("retention")
class Retention(Probe):
    """128 live edits at full moments, 48 at powers of two, up to 512 at the end of the stream."""

    summary = "live edits of all ages, asked as they were edited"
    version = 1

    def ask(self, past: Past, moment: Moment) -> list[Planned]:
        if not (moment.full or "power" in moment.reasons):
            return []
        n = 512 if "end" in moment.reasons else 128 if moment.full else 48
        return ask_by_age(past, moment, past.size(n), ("edit",))
