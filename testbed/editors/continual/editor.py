"""Avalanche's continual-learning strategies as editors: `avalanche:replay`, `avalanche:ewc`, ...

Each batch of edits is one experience. Avalanche is imported when such an editor is bound to a model, and not before.
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
from testbed.editors.continual.methods import METHODS, REFUSED, Method, load_avalanche, missing
from testbed.editors.continual.rows import IGNORE, LAYER, AnswerModel, AnswerRows, RowActivations
from testbed.model.layout import adds_as_it_is


class AvalancheEditor(WeightEditor):
    """Trains the last down-projection with one strategy of Avalanche.

    An edit that the strategy replays is stored as its activations at the answer (`RowActivations`), never as a picture.

    State: `weight` (in the shape in which the model stores it, float32); the strategy's tensors of the same shape as
    `carried_NAME`; for n replayed edits `act` (n, A, f), `rest` (n, A, d) and `target` (n, A), A tokens the longest answer,
    their `draws` (n,), `sizes` of their groups and event ids (`edits`); and the number of experiences `trained`.
    """

    method: ClassVar[str]

    def _prepare(self, pool: TrainPool) -> None:
        problems = self.config.problems()
        if problems:
            raise BadEditor(f"{self.name} cannot run: " + "; ".join(problems))
        if not adds_as_it_is(self.handle, LAYER):
            raise BadEditor(
                f"{self.name} cannot train the last layer of {self.handle.name}: what lies behind its down-projection (a norm, a gate or "
                "experts) would have to be run with whole prompts, and it keeps the activations of answers alone"
            )
        strategies = load_avalanche()
        self.adapter = strategies.adapter(self.method, self.config)
        self.weight_name = self.handle.down_weight(LAYER)
        self.base = self.handle.parameter(self.weight_name).detach().float().clone()
        self.weight = self.base
        self.strategy_state = strategies.StrategyState()
        self.rows = AnswerRows(self.handle)
        self.edits: dict[int, str] = {}
        """Event id by the number of a replayed row."""

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        from testbed.editors.continual._strategies import StepLimiter, experience_of, plugin_of, seeded

        before, rows, edits = self._without_revised(batch)
        new = [rows.add(e.ask(), e.target) for e in batch.events]
        model = AnswerModel(rows)
        model.weight.data = self.adapter.initial_weight(self.base, self.weight).clone()
        strategy = self.adapter.strategy(model)
        self.adapter.restore(strategy, before)
        experience = experience_of(rows, self.adapter.experience_rows(before, new))
        with timed("train"), seeded(self.generator(batch.step)):
            strategy.train([experience], eval_streams=[])
        self.weight, self.strategy_state = model.weight.detach(), self.adapter.extract(strategy)
        self.rows, self.edits = rows, {**edits, **{i: e.id for i, e in zip(new, batch.events)}}
        return {"loss": plugin_of(strategy, StepLimiter).loss, "memory": float(len(self.strategy_state.rows))}

    def _without_revised(self, batch: EditBatch) -> tuple[Any, AnswerRows, dict[int, str]]:
        """The strategy's state without the edits that this batch revises, a new table of the rows that stay, and their event ids."""
        revised = {e.revises for e in batch.events} if getattr(self.config, "drop_revised", False) else set()
        state = self.strategy_state.without({i for i in self.strategy_state.rows if self.edits[i] in revised})
        rows = AnswerRows(self.handle)
        number = {i: rows.add_activations(self.rows.activations(i)) for i in state.rows}
        groups = [[number[i] for i in group] for group in state.groups]
        return replace(state, groups=groups), rows, {number[i]: self.edits[i] for i in state.rows}

    def edited_weights(self) -> dict[str, torch.Tensor]:
        return {self.weight_name: self.weight}

    def _state(self) -> dict[str, Any]:
        strategy = self.strategy_state
        rows = [self.rows.activations(i) for i in strategy.rows]
        out: dict[str, Any] = {"weight": self.weight, **{f"carried_{k}": v for k, v in strategy.tensors.items()}}
        if rows:
            out |= {name: _padded([getattr(r, name) for r in rows]) for name in ("act", "rest", "target")}
            out |= {"draws": strategy.draws, "sizes": torch.tensor([len(g) for g in strategy.groups])}
        return out | {"edits": [self.edits[i] for i in strategy.rows], "trained": strategy.trained}

    def _load(self, state: dict[str, Any]) -> None:
        device, shape = self.base.device, tuple(self.base.shape)
        self.weight = need(state, "weight", shape).to(device)
        tensors = {k.removeprefix("carried_"): need(state, k, shape).to(device) for k in state if k.startswith("carried_")}
        groups, draws = [], torch.zeros(0)
        self.rows, self.edits = AnswerRows(self.handle), dict(enumerate(state["edits"]))
        if self.edits:
            numbers = iter(self._load_rows(state, len(self.edits)))
            groups = [[next(numbers) for _ in range(int(n))] for n in need(state, "sizes", (None,))]
            draws = need(state, "draws", (None,)).cpu()
        self.strategy_state = replace(self.strategy_state, groups=groups, draws=draws, tensors=tensors, trained=state["trained"])

    def _load_rows(self, state: dict[str, Any], n: int) -> list[int]:
        """Put the n stored rows into the table; returns their numbers."""
        width, features = self.handle.width, self.base.numel() // self.handle.width
        target = need(state, "target", (n, None))
        act, rest = need(state, "act", (n, target.shape[1], features)), need(state, "rest", (n, target.shape[1], width))
        real = target != IGNORE
        rows = [RowActivations(*(x[i][real[i]].to(self.base.device) for x in (act, rest, target))) for i in range(n)]
        return [self.rows.add_activations(r) for r in rows]


def _padded(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """(n, A, ...) from n tensors (a, ...): token ids are padded with -100, activations with zeros."""
    return pad_sequence(list(parts), batch_first=True, padding_value=0 if parts[0].is_floating_point() else IGNORE)


def _register(method: str, row: Method) -> None:
    what = "; ".join([f"Avalanche: {row.summary}", *missing()])
    own = {"method": method, "Config": row.config, "summary": what, "__module__": __name__, "__doc__": what}
    EDITORS.register(f"avalanche:{method}")(type(f"Avalanche{method.capitalize()}", (AvalancheEditor,), own))


for _name, _row in METHODS.items():
    _register(_name, _row)
for _name, _reason in REFUSED.items():
    EDITORS.refuse(f"avalanche:{_name}", f"it cannot learn answers of several tokens: {_reason}")
