"""Avalanche's strategies, and what each carries from one batch of edits to the next as plain tensors.

A strategy is built anew for each batch and given what the last one carried, so nothing hides in an object: a stopped
run goes on bit for bit, and an edit that fails leaves nothing behind.

This module is private to its package because it imports Avalanche, which the scan for editors must not.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, GEMPlugin, MASPlugin
from avalanche.training.supervised import Cumulative, JointTraining
from avalanche.training.templates import SupervisedTemplate
from avalanche.training.utils import ParamData
from torch import Tensor

from testbed.editors.base import BadEditor
from testbed.editors.continual._strategies import CopyingSI, Distil, FlatAGEM, FlatReplay, Pace, dataset_of, numbers_of
from testbed.editors.continual.methods import METHODS, REFUSED
from testbed.editors.continual.rows import AnswerModel, Rows, answer_loss


@dataclass(frozen=True)
class Carried:
    """What a strategy remembers between two batches of edits.

    groups: numbers of remembered rows, a list for each remembered batch or one for all. draws: (rows,) what a reservoir
    drew for each of them. tensors: everything else. trained: experiences that the strategy's clock counts.
    """

    groups: list[list[int]] = field(default_factory=list)
    draws: Tensor = field(default_factory=lambda: torch.zeros(0))
    tensors: dict[str, Tensor] = field(default_factory=dict)
    trained: int = 0

    @property
    def rows(self) -> list[int]:
        return [i for group in self.groups for i in group]

    def without(self, gone: set[int]) -> Carried:
        """The same with these rows forgotten."""
        stay = [i not in gone for i in self.rows]
        groups = [[i for i in group if i not in gone] for group in self.groups]
        draws = self.draws[torch.tensor(stay)] if len(self.draws) else self.draws
        return replace(self, groups=[g for g in groups if g], draws=draws)


class Carrier:
    """Builds one strategy and moves what it carries in and out. This one carries nothing but a count."""

    template: Any = SupervisedTemplate

    def __init__(self, config: Any) -> None:
        self.config = config

    def plugins(self) -> list[Any]:
        return []

    def strategy(self, model: AnswerModel, plugins: Sequence[Any] = (), evaluator: Any = None) -> Any:
        """The strategy, ready to `train`; also outside the testbed's loop."""
        c = self.config
        return self.template(
            model=model,
            optimizer=torch.optim.Adam(model.parameters(), lr=c.lr),
            criterion=answer_loss,
            train_mb_size=c.rows,
            train_epochs=c.steps,
            eval_mb_size=256,
            device=model.weight.device,
            plugins=[Pace(c.steps), *self.plugins(), *plugins],
            evaluator=evaluator or _silent(),
        )

    def start(self, base: Tensor, now: Tensor) -> Tensor:
        """The weight that training on a batch begins with."""
        return now

    def lesson(self, carried: Carried, new: list[int]) -> list[int]:
        """The rows of the experience that a batch of edits becomes."""
        return new

    def put(self, strategy: Any, carried: Carried) -> None:
        """Make a new strategy the one that `take` was called on."""
        strategy.clock.train_exp_counter = carried.trained

    def take(self, strategy: Any) -> Carried:
        """What the strategy has to remember."""
        return Carried(trained=strategy.clock.train_exp_counter)


def _silent() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that nothing is logged is meant
        return EvaluationPlugin()


def _find(strategy: Any, kind: type) -> Any:
    return next(p for p in strategy.plugins if isinstance(p, kind))


class Reservoir(Carrier):
    """A reservoir of rows, each with the draw that keeps it in."""

    kind: type

    def put(self, strategy: Any, carried: Carried) -> None:
        super().put(strategy, carried)
        if carried.rows:
            plugin = _find(strategy, self.kind)
            plugin.storage_policy.buffer = dataset_of(strategy.model.rows, carried.rows)
            plugin.storage_policy._buffer_weights = carried.draws
            plugin.buffers = [plugin.storage_policy.buffer]

    def take(self, strategy: Any) -> Carried:
        policy = _find(strategy, self.kind).storage_policy
        return replace(super().take(strategy), groups=[numbers_of(policy.buffer)], draws=policy._buffer_weights)


class Replay(Reservoir):
    kind = FlatReplay

    def plugins(self) -> list[Any]:
        return [FlatReplay(self.config.memory, self.config.sample)]


class Agem(Reservoir):
    kind = FlatAGEM

    def plugins(self) -> list[Any]:
        return [FlatAGEM(self.config.memory, self.config.sample)]


class CumulativeCarrier(Carrier):
    """Every row so far."""

    template = Cumulative

    def put(self, strategy: Any, carried: Carried) -> None:
        super().put(strategy, carried)
        strategy.dataset = dataset_of(strategy.model.rows, carried.rows) if carried.rows else None

    def take(self, strategy: Any) -> Carried:
        return replace(super().take(strategy), groups=[numbers_of(strategy.dataset)])


class Joint(Carrier):
    """Every row so far, in one experience, from the base."""

    template = JointTraining

    def start(self, base: Tensor, now: Tensor) -> Tensor:
        return base

    def lesson(self, carried: Carried, new: list[int]) -> list[int]:
        return [*carried.rows, *new]

    def take(self, strategy: Any) -> Carried:
        return replace(super().take(strategy), groups=[[i for e in strategy._experiences for i in numbers_of(e.dataset)]])


class Ewc(Carrier):
    def plugins(self) -> list[Any]:
        return [EWCPlugin(self.config.strength, mode="online", decay_factor=self.config.decay)]

    def put(self, strategy: Any, carried: Carried) -> None:
        super().put(strategy, carried)
        if carried.trained:
            plugin, last = _find(strategy, EWCPlugin), carried.trained - 1
            plugin.saved_params[last] = _named(carried.tensors["anchor"])
            plugin.importances[last] = _named(carried.tensors["importance"])

    def take(self, strategy: Any) -> Carried:
        plugin, last = _find(strategy, EWCPlugin), strategy.clock.train_exp_counter - 1
        kept = {"anchor": plugin.saved_params[last], "importance": plugin.importances[last]}
        return replace(super().take(strategy), tensors=_plain(kept))


class Mas(Carrier):
    def plugins(self) -> list[Any]:
        return [MASPlugin(self.config.strength, self.config.alpha)]

    def put(self, strategy: Any, carried: Carried) -> None:
        super().put(strategy, carried)
        if carried.trained:
            plugin = _find(strategy, MASPlugin)
            plugin.params, plugin.importance = (_named(carried.tensors[k]) for k in ("anchor", "importance"))

    def take(self, strategy: Any) -> Carried:
        plugin = _find(strategy, MASPlugin)
        return replace(super().take(strategy), tensors=_plain({"anchor": plugin.params, "importance": plugin.importance}))


class Si(Carrier):
    def plugins(self) -> list[Any]:
        return [CopyingSI(self.config.strength, self.config.damping)]

    def put(self, strategy: Any, carried: Carried) -> None:
        super().put(strategy, carried)
        if carried.trained:
            plugin = _find(strategy, CopyingSI)
            plugin.create_syn_data(strategy.model, plugin.ewc_data, plugin.syn_data, set())
            for name, params in self._kept(plugin).items():
                params["weight"].data = carried.tensors[name].cpu().flatten().clone()

    def take(self, strategy: Any) -> Carried:
        shape = strategy.model.weight.shape
        kept = _plain(self._kept(_find(strategy, CopyingSI)))
        return replace(super().take(strategy), tensors={k: v.reshape(shape) for k, v in kept.items()})

    def _kept(self, plugin: Any) -> dict[str, Any]:
        return {"importance": plugin.ewc_data[1], "path": plugin.syn_data["cum_trajectory"]}


class Lwf(Carrier):
    def plugins(self) -> list[Any]:
        return [Distil(self.config.strength, self.config.temperature)]


class Gem(Carrier):
    """Rows of the newest batches; the clock counts the batches that are remembered."""

    def plugins(self) -> list[Any]:
        return [GEMPlugin(self.config.patterns, self.config.margin)]

    def put(self, strategy: Any, carried: Carried) -> None:
        strategy.clock.train_exp_counter = len(carried.groups)
        plugin, rows = _find(strategy, GEMPlugin), strategy.model.rows
        for t, group in enumerate(carried.groups):
            data = dataset_of(rows, group)
            x, y, task = data.collate_fn([data[i] for i in range(len(group))])
            plugin.memory_x[t], plugin.memory_y[t], plugin.memory_tid[t] = x, y, task

    def take(self, strategy: Any) -> Carried:
        groups = [x.tolist() for x in _find(strategy, GEMPlugin).memory_x.values()]
        return replace(super().take(strategy), groups=groups[-self.config.batches :])


def _named(tensor: Tensor) -> dict[str, Any]:
    return {"weight": ParamData("weight", init_tensor=tensor.clone(), device=tensor.device)}


def _plain(params: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v["weight"].data.detach().clone() for k, v in params.items()}


CARRIERS: dict[str, type[Carrier]] = {
    "naive": Carrier,
    "replay": Replay,
    "cumulative": CumulativeCarrier,
    "joint": Joint,
    "ewc": Ewc,
    "si": Si,
    "mas": Mas,
    "lwf": Lwf,
    "gem": Gem,
    "agem": Agem,
}


def answer_strategy(name: str, rows: Rows, config: Any = None, plugins: Sequence[Any] = (), evaluator: Any = None) -> Any:
    """One of Avalanche's strategies over the answers of a benchmark (`benchmark.rows`), ready to train.

    Args:
        name: `naive`, `replay`, ... as in `--editor avalanche:NAME`.
        config: its settings (`EDITORS.get("avalanche:NAME").Config`); None is the defaults.

    Raises `BadEditor` for a name that is not offered, with the reason, or settings that cannot be.
    """
    if name not in CARRIERS:
        why = f"it cannot learn answers of several tokens: {REFUSED[name]}" if name in REFUSED else f"there are {', '.join(CARRIERS)}"
        raise BadEditor(f"the strategy {name!r} is not offered: {why}")
    config = config or METHODS[name].config()
    if config.problems():
        raise BadEditor(f"{name}: " + "; ".join(config.problems()))
    return CARRIERS[name](config).strategy(AnswerModel(rows), plugins, evaluator)
