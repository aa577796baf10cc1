"""Norm anchoring (NAS, arXiv 2602.02543): every target keeps the length that targets have on the unedited model.

The length of `v* = v + delta`, v the MLP's output, grows along a stream and drives collapse. Here each v* is scaled
to an anchor, the mean length on the unedited model, and the delta follows: `delta' = v* anchor / |v*| - v`. An edit
whose v* is more than twice as long as the anchor is left out of the batch's changes (its delta is 0) and counted.

The anchor is the mean, without the longest and shortest 2.5 %, over the stream's own first edits, whose targets
are sought a second time under the unedited weights; it is settled after `pilot` of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.ranges import PositiveInt
from testbed.core.registry import WRAPPERS
from testbed.editors.base import EditorConfig, Wrapper
from testbed.editors.locate.core import LocateEditor
from testbed.editors.locate.targets import Targets, TargetTask, attention_and_mlp_outputs

_FAR = 2.0
"""Multiple of the anchor over which a target is not used."""
_TRIMMED = 0.05
"""Share of lengths left out of the mean, half at either end."""


@dataclass(frozen=True)
class AnchorConfig(EditorConfig):
    pilot: PositiveInt = 100
    """Edits whose targets on the unedited model make the anchor (the paper takes 1,000 of its own)."""


@WRAPPERS.register("anchor")
class Anchor(Wrapper, LocateEditor):
    """Targets of one length."""

    summary = "targets scaled to the length they have on the unedited model (NAS)"
    hosts = LocateEditor
    Config = AnchorConfig

    def _prepare(self, pool: TrainPool) -> None:
        super()._prepare(pool)
        self.lengths: Mapping[int, Tensor] = {}

    def _search(self, task: TargetTask, unit: Tensor) -> Targets:
        found = super()._search(task, unit)
        self._pilot(task, unit)
        start = attention_and_mlp_outputs(task.handle, task.events, task.layer)[1]
        delta = anchored(start, found.delta, trimmed_mean(self.lengths[task.layer]))
        return replace(found, delta=delta)

    def _pilot(self, task: TargetTask, unit: Tensor) -> None:
        """Add the lengths of these edits' targets under the unedited weights, up to the number that is wanted."""
        known = self.lengths.get(task.layer, torch.zeros(0))
        missing = self.config.pilot - len(known)
        if missing <= 0:
            return
        part = task.part(list(range(min(missing, len(task.events)))))
        with task.handle.swapped(self.deltas.bases):
            start = attention_and_mlp_outputs(task.handle, part.events, task.layer)[1]
            found = super()._search(part, unit[: len(part.events)])
        lengths = (start + found.delta).norm(dim=1).cpu()
        self.lengths = {**self.lengths, task.layer: torch.cat([known, lengths])}

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), **{f"lengths.{n}": t for n, t in self.lengths.items()}}

    def _load(self, state: dict[str, Any]) -> None:
        super()._load(state)
        self.lengths = {int(k.partition(".")[2]): t.cpu() for k, t in state.items() if k.startswith("lengths.")}


def trimmed_mean(lengths: Tensor) -> float:
    """Mean without the shortest and longest 2.5 %."""
    cut = int(len(lengths) * _TRIMMED / 2)
    return float(lengths.sort().values[cut : len(lengths) - cut].mean())


def anchored(start: Tensor, delta: Tensor, anchor: float) -> Tensor:
    """(n, d) the change with which `start + delta` has length `anchor`; 0 where it is over twice as long before."""
    v = start + delta
    length = v.norm(dim=1, keepdim=True)
    scaled = v * (anchor / length.clamp(min=1e-30)) - start
    return torch.where(length > _FAR * anchor, torch.zeros_like(delta), scaled)
