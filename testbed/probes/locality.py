"""Locality: are the neighbours of an edit unchanged? Four distances, each judged by the unedited model's own answer."""

from __future__ import annotations

from testbed.core.events import LOCALITY_SPLITS
from testbed.core.registry import PROBES
from testbed.probes.base import Checkpoint, EditHistory, Planned, Probe, ask_at_full


@PROBES.register("locality")
class Locality(Probe):
    """48 live edits (96 at the end), one neighbour of each kind."""

    summary = "same question on another picture, another question on the same picture, far facts, text facts"
    version = 2

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        return ask_at_full(history, checkpoint, 48, LOCALITY_SPLITS)
