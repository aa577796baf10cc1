"""CoME (Jung et al. 2025, conflict-free model editing by unlearning): the old answer is taken out of the new target.

A second search finds `delta'`, the change that would make the model give the *old* answer. With the common
direction `c` of delta and delta' and the part `q = (delta' . c) c` that both need, the target moves by
`delta - a (delta' - q)` on the coordinates where the new output is among its largest, and by delta elsewhere.
Needs the old answer of each edit; an edit that names none is made as its host makes it, and counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from testbed.core.ranges import Fraction, NonNegativeFloat
from testbed.core.registry import WRAPPERS
from testbed.editors.base import Editor, EditorConfig, Wrapper
from testbed.editors.locate.core import LocateEditor
from testbed.editors.locate.targets import Targets, TargetTask, search, unchanged_outputs


@dataclass(frozen=True)
class ComeConfig(EditorConfig):
    a: NonNegativeFloat = 0.1
    """Weight of what is unlearned."""
    p: Fraction = 0.2
    """Share of coordinates, those where h + delta is largest (signed), on which it is unlearned."""
    variant: Literal["paper", "code"] = "paper"
    """paper: `delta - a (delta' - q)`; code: `delta - a delta' + q`, as released."""


@WRAPPERS.register("come")
class Come(Wrapper, LocateEditor):
    """Targets from which the old answer is unlearned."""

    summary = "the old answer is unlearnt from the target (CoME)"
    hosts = LocateEditor
    Config = ComeConfig

    @classmethod
    def over(cls, host: type[Editor], name: str) -> type[Editor]:
        made = super().over(host, name)
        made.traits = replace(host.traits, uses=host.traits.uses | {"previous"})
        return made

    def _search(self, task: TargetTask, unit: Tensor) -> Targets:
        found = super()._search(task, unit)
        known = [i for i, e in enumerate(task.events) if e.previous]
        if not known:
            return found
        old = [replace(task.events[i], target=task.events[i].previous or "") for i in known]
        half = replace(self.hyper, steps=max(1, self.hyper.steps // 2))
        away = search(replace(task, events=old), half, unit[known])
        output = unchanged_outputs(task.handle, old, task.layer)
        delta = found.delta.clone()
        delta[known] = unlearned(delta[known], away.delta, output, self.config)
        return replace(found, delta=delta)


def unlearned(delta: Tensor, old: Tensor, output: Tensor, config: ComeConfig) -> Tensor:
    """(n, d) the new answer's change with the old answer's taken out where h + delta is largest.

    delta, old, output: (n, d) changes for the new and the old answer, and the output they are added to.
    """
    unit = torch.nn.functional.normalize
    common = unit(unit(delta, dim=1) + unit(old, dim=1), dim=1)
    q = (old * common).sum(1, keepdim=True) * common
    moved = delta - config.a * (old - q) if config.variant == "paper" else delta - config.a * old + q
    count = round(config.p * delta.shape[1])
    if count == 0:
        return delta
    least = (output + delta).topk(count, dim=1).values[:, -1:]
    return torch.where(output + delta >= least, moved, delta)
