"""Avalanche's continual-learning strategies as editors: `avalanche:replay`, `avalanche:ewc`, ...

Each batch of edits is one experience. Avalanche is imported when such an editor meets a model, and not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from streams.base import TrainPool
from testbed.core.events import EditBatch
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.base import BadEditor, WeightEditor, need
from testbed.editors.continual.methods import METHODS, REFUSED, Method, load, missing
from testbed.editors.continual.rows import IGNORE, LAYER, AnswerModel, Kept, Rows


class AvalancheEditor(WeightEditor):
    """One strategy over the last down-projection. What it remembers of an edit is what enters that layer, not the picture."""

    method: ClassVar[str]

    def _prepare(self, pool: TrainPool) -> None:
        problems = self.config.problems()
        if problems:
            raise BadEditor(f"{self.name} cannot run: " + "; ".join(problems))
        carriers = load()
        self.carrier = carriers.CARRIERS[self.method](self.config)
        self.weight_name = self.handle.down_weight(LAYER)
        self.base = self.handle.parameter(self.weight_name).detach().float().clone()
        self.weight = self.base
        self.carried = carriers.Carried()
        self.rows = Rows(self.handle)
        self.edits: dict[int, str] = {}
        """Event id by number of a remembered row."""

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        from testbed.editors.continual import _strategies as bridge

        carried, rows, edits = self._compact(batch)
        new = [rows.add(e.ask(), e.target) for e in batch.events]
        model = AnswerModel(rows)
        model.weight.data = self.carrier.start(self.base, self.weight).clone()
        strategy = self.carrier.strategy(model)
        self.carrier.put(strategy, carried)
        experience = bridge.experience_of(rows, self.carrier.lesson(carried, new))
        with timed("train"), bridge.seeded(self.generator(batch.step)):
            strategy.train([experience], eval_streams=[])
        self.weight, self.carried = model.weight.detach(), self.carrier.take(strategy)
        self.rows, self.edits = rows, {**edits, **{i: e.id for i, e in zip(new, batch.events)}}
        return {"loss": bridge.pace(strategy).loss, "memory": float(len(self.carried.rows))}

    def _compact(self, batch: EditBatch) -> tuple[Any, Rows, dict[int, str]]:
        """The memory without the edits that this batch revises, its rows numbered anew in a table of their own."""
        revised = {e.revises for e in batch.events} if getattr(self.config, "drop_revised", False) else set()
        carried = self.carried.without({i for i in self.carried.rows if self.edits[i] in revised})
        rows = Rows(self.handle)
        number = {i: rows.add_kept(self.rows.kept(i)) for i in carried.rows}
        groups = [[number[i] for i in group] for group in carried.groups]
        return replace(carried, groups=groups), rows, {number[i]: self.edits[i] for i in carried.rows}

    def edited_weights(self) -> dict[str, torch.Tensor]:
        return {self.weight_name: self.weight}

    def _state(self) -> dict[str, Any]:
        numbers = self.carried.rows
        kept = [self.rows.kept(i) for i in numbers]
        out: dict[str, Any] = {"weight": self.weight, **{f"carried_{k}": v for k, v in self.carried.tensors.items()}}
        if kept:
            out |= {name: _padded([getattr(k, name) for k in kept]) for name in ("act", "rest", "target")}
            out |= {"draws": self.carried.draws, "sizes": torch.tensor([len(g) for g in self.carried.groups])}
        return out | {"edits": [self.edits[i] for i in numbers], "trained": self.carried.trained}

    def _load(self, state: dict[str, Any]) -> None:
        device, shape = self.base.device, tuple(self.base.shape)
        self.weight = need(state, "weight", shape).to(device)
        tensors = {k.removeprefix("carried_"): need(state, k, shape).to(device) for k in state if k.startswith("carried_")}
        groups, draws = [], torch.zeros(0)
        self.rows, edits = Rows(self.handle), state["edits"]
        if edits:
            numbers = iter(self._remember(state, len(edits)))
            groups = [[next(numbers) for _ in range(int(n))] for n in need(state, "sizes", (None,))]
            draws = need(state, "draws", (None,)).cpu()
        self.edits = dict(enumerate(edits))
        self.carried = replace(self.carried, groups=groups, draws=draws, tensors=tensors, trained=state["trained"])

    def _remember(self, state: dict[str, Any], n: int) -> list[int]:
        """The rows of a stored memory, put into the table."""
        width, entering = self.handle.width, self.base.numel() // self.handle.width
        target = need(state, "target", (n, None))
        act, rest = need(state, "act", (n, target.shape[1], entering)), need(state, "rest", (n, target.shape[1], width))
        real = target != IGNORE
        kept = [Kept(*(x[i][real[i]].to(self.base.device) for x in (act, rest, target))) for i in range(n)]
        return [self.rows.add_kept(k) for k in kept]


def _padded(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """(n, A, ...) of parts (a, ...): token ids are filled up with -100, activations with zeros."""
    return pad_sequence(list(parts), batch_first=True, padding_value=0 if parts[0].is_floating_point() else IGNORE)


def _register(method: str, row: Method) -> None:
    what = "; ".join([f"Avalanche: {row.summary}", *missing()])
    own = {"method": method, "Config": row.config, "summary": what, "__module__": __name__, "__doc__": what}
    EDITORS.register(f"avalanche:{method}")(type(f"Avalanche{method.capitalize()}", (AvalancheEditor,), own))


for _name, _row in METHODS.items():
    _register(_name, _row)
for _name, _reason in REFUSED.items():
    EDITORS.refuse(f"avalanche:{_name}", f"it cannot learn answers of several tokens: {_reason}")
