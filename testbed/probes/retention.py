"""Are earlier edits still there? A panel of live edits stratified by age."""

from __future__ import annotations

from testbed.core.registry import PROBES
from testbed.probes.base import Checkpoint, EditHistory, Planned, Probe, ask_by_age


@PROBES.register("retention")
class Retention(Probe):
    """128 live edits at full checkpoints, 48 at powers of two, up to 512 at the end of the stream."""

    summary = "live edits of all ages, asked as they were edited"
    version = 1

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        if not (checkpoint.full or "power" in checkpoint.reasons):
            return []
        n = 512 if "end" in checkpoint.reasons else 128 if checkpoint.full else 48
        return ask_by_age(history, checkpoint, history.size(n), ("edit",))
