"""PMET (Li et al. 2024, arXiv 2308.08742): changes of attention and MLP are sought together, the MLP's alone is written.

With both free to move, the MLP's part does not have to stand in for what attention would do. The target is the
MLP's own output plus its part; the residual `V - v` is what that output lacks, and a layer takes `1 / sqrt(left)`
of it. Once the answer is the likeliest at every token its loss counts a tenth, and the search ends when the
drift of the subject is small too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from testbed.core.registry import EDITORS
from testbed.editors.locate.hyperparameters import Hyper
from testbed.editors.locate.keys import Sweep
from testbed.editors.locate.memit import Memit, MemitConfig
from testbed.editors.locate.positions import Rows
from testbed.editors.locate.targets import Forward, Found, Task, parts_of, search
from testbed.model.suffix_columns import Behind, behind

_KNOWN = 0.1
"""Weight of the answer's loss once the answer is the likeliest."""
_SETTLED = 0.01
"""Drift (nats) under which a search ends then."""


@dataclass(frozen=True)
class PmetConfig(MemitConfig):
    """MEMIT's fields; `lam` comes from the table's PMET column."""


class Both(Forward):
    """The loss of a delta (n, 2 d): a part for the attention's output, and one for the MLP's."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.known = torch.zeros(self.n, dtype=torch.bool)
        self.drift = torch.zeros(self.n)

    def _enter(self, task: Task, rows: Rows, width: int | None) -> Behind:
        return behind(task.handle, rows.batch, task.layer, int(rows.at[0]), width)

    def losses(self, delta: Tensor, kl: float) -> Tensor:
        answers, essence = self._read(delta)
        each, likeliest = self._answers(answers)
        nll = self._over_edits(each)
        self.known = self._over_edits(likeliest.float()) > 1 - 1e-6
        drift = self._drift(essence)
        self.drift = drift.detach()
        return torch.where(self.known, _KNOWN * nll, nll) + kl * drift

    def done(self, loss: Tensor, stop: float) -> Tensor:
        return (loss < stop) | (self.known & (self.drift < _SETTLED))

    def _ends(self, rows: Behind, delta: Tensor, column: int, at: Tensor) -> Tensor:
        above, here = rows.above, column - rows.start
        attention, mlp = delta.chunk(2, dim=1)

        def put(module: Any, args: Any, output: Any) -> Any:
            out = (output[0] if isinstance(output, tuple) else output).clone()
            out[:, here] += attention.to(out)
            return (out, *output[1:]) if isinstance(output, tuple) else out

        with above.handle.hooked(above.handle.attention(self.layer), put):
            hidden = above.layer(self.layer, above.hidden).clone()
        hidden[:, here] += mlp.to(hidden)
        out = above.through(hidden, self.layer + 1, above.handle.n_layers)
        return above.ends(out, at[:, rows.start : rows.start + out.shape[1]])


@EDITORS.register("pmet")
class Pmet(Memit):
    """MEMIT with targets of the MLP alone."""

    summary = "MEMIT with attention and MLP sought together, the MLP's part written (PMET)"
    Config = PmetConfig

    def _tuned(self, hyper: Hyper) -> Hyper:
        """PMET's own search where the model has a row in the table, and what the configuration sets."""
        own: dict[str, Any] = {} if hyper.relative else {"steps": 30, "lr": 0.2, "kl": 1.0}
        own["clamp"] = hyper.clamp_pmet if not hyper.relative else hyper.clamp
        return replace(hyper, **{k: v for k, v in own.items() if getattr(self.config, k) is None})

    def _lam(self) -> float:
        return self.hyper.lam_pmet if self.config.lam is None else self.config.lam

    def _share(self, left: int) -> float:
        return 1 / math.sqrt(left)

    def _unit(self, task: Task, heights: Tensor) -> Tensor:
        """(n, 2) norms of the two outputs."""
        return torch.stack([part.norm(dim=1) for part in parts_of(task.handle, task.events, task.layer)], 1)

    def _search(self, task: Task, unit: Tensor) -> Found:
        found = search(task, self.hyper, unit, Both)
        return replace(found, delta=found.delta[:, task.handle.width :])

    def _start(self, task: Task, heights: Tensor) -> Tensor:
        return parts_of(task.handle, task.events, task.layer)[1]

    def _residual(self, sweep: Sweep, target: Tensor, keys: Tensor) -> Tensor:
        return target - sweep.ahead_mlp()
