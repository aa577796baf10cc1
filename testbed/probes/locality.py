"""Is what lies beside an edit left alone? Four distances, each judged by the unedited model's own answer."""

from __future__ import annotations

from testbed.core.events import LOCALITY_SPLITS
from testbed.core.registry import PROBES
from testbed.probes.base import Moment, Past, Planned, Probe, ask_by_age


@PROBES.register("locality")
class Locality(Probe):
    """48 live edits (96 at the end), one neighbour of each kind."""

    summary = "same question on another picture, another question on the same picture, far facts, text facts"
    version = 2

    def ask(self, past: Past, moment: Moment) -> list[Planned]:
        if not moment.full:
            return []
        n = past.size(96 if "end" in moment.reasons else 48)
        return ask_by_age(past, moment, n, LOCALITY_SPLITS)
