"""Strategy state adapters: they build Avalanche's strategies and move their state in and out as plain tensors.

Each batch of edits gets a new strategy, to which the state after the last batch is restored. Nothing is kept in the
strategy object itself, so a stopped run continues bit-identically, and an edit that fails changes nothing.

This module is private to its package because it imports Avalanche, which the scan for editors must not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, GEMPlugin, MASPlugin
from avalanche.training.supervised import Cumulative, JointTraining
from avalanche.training.templates import SupervisedTemplate
from avalanche.training.utils import ParamData
from torch import Tensor

from testbed.editors.base import BadEditor
from testbed.editors.continual._strategies import (
    AnswerDistillation,
    CopyingSI,
    FlatAGEM,
    FlatReplay,
    StepLimiter,
    dataset_of,
    numbers_of,
    plugin_of,
)
from testbed.editors.continual.methods import METHODS, REFUSED
from testbed.editors.continual.rows import AnswerModel, AnswerRows, answer_loss


@dataclass(frozen=True)
class StrategyState:
    """What a strategy remembers between two batches of edits.

    groups: numbers of the rows that are kept for replay, in one list or in a list for each batch. draws: (rows,) the
    random number of each row in a reservoir. tensors: everything else by name. trained: experiences on the strategy's clock.
    """

    groups: list[list[int]] = field(default_factory=list)
    draws: Tensor = field(default_factory=lambda: torch.zeros(0))
    tensors: dict[str, Tensor] = field(default_factory=dict)
    trained: int = 0

    @property
    def rows(self) -> list[int]:
        return [i for group in self.groups for i in group]

    def without(self, dropped: set[int]) -> StrategyState:
        """The same state without these rows."""
        stay = [i not in dropped for i in self.rows]
        groups = [[i for i in group if i not in dropped] for group in self.groups]
        draws = self.draws[torch.tensor(stay)] if len(self.draws) else self.draws
        return replace(self, groups=[g for g in groups if g], draws=draws)


class StateAdapter:
    """Builds strategies that remember nothing but a count (naive, LwF); subclasses move the state of the others in and out.

    `plugins` makes the plug-ins that turn Avalanche's template into the strategy.
    """

    template: Any = SupervisedTemplate

    def __init__(self, config: Any, plugins: Callable[[Any], list[Any]]) -> None:
        self.config, self.plugins = config, plugins

    def strategy(self, model: AnswerModel, plugins: Sequence[Any] = (), evaluator: Any = None) -> Any:
        """The strategy, ready to `train`; also for use outside the testbed's loop."""
        c = self.config
        return self.template(
            model=model,
            optimizer=torch.optim.Adam(model.parameters(), lr=c.lr),
            criterion=answer_loss,
            train_mb_size=c.rows,
            train_epochs=c.steps,
            eval_mb_size=256,
            device=model.weight.device,
            plugins=[StepLimiter(c.steps), *self.plugins(c), *plugins],
            evaluator=evaluator or _silent_evaluator(),
        )

    def initial_weight(self, base: Tensor, edited: Tensor) -> Tensor:
        """The weight from which training on a batch starts."""
        return edited

    def experience_rows(self, state: StrategyState, new: list[int]) -> list[int]:
        """The rows of the experience that a batch of edits becomes."""
        return new

    def restore(self, strategy: Any, state: StrategyState) -> None:
        """Bring a new strategy into a state that `extract` returned."""
        strategy.clock.train_exp_counter = state.trained
        if state.trained:
            self._restore(strategy, state)

    def extract(self, strategy: Any) -> StrategyState:
        """The state of a strategy after training."""
        return StrategyState(trained=strategy.clock.train_exp_counter, **self._extract(strategy))

    def _restore(self, strategy: Any, state: StrategyState) -> None:
        """Set everything but the clock."""

    def _extract(self, strategy: Any) -> dict[str, Any]:
        """The fields of the state, but for the clock."""
        return {}


def _silent_evaluator() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that nothing is logged, which is intended
        return EvaluationPlugin()


class ReservoirAdapter(StateAdapter):
    """A reservoir of rows, each with the random number that keeps it in."""

    kinds = (FlatReplay, FlatAGEM)

    def _restore(self, strategy: Any, state: StrategyState) -> None:
        if state.rows:
            plugin = plugin_of(strategy, self.kinds)
            plugin.storage_policy.buffer = dataset_of(strategy.model.rows, state.rows)
            plugin.storage_policy._buffer_weights = state.draws
            plugin.buffers = [plugin.storage_policy.buffer]

    def _extract(self, strategy: Any) -> dict[str, Any]:
        policy = plugin_of(strategy, self.kinds).storage_policy
        return {"groups": [numbers_of(policy.buffer)], "draws": policy._buffer_weights}


class CumulativeAdapter(StateAdapter):
    """Every row so far."""

    template = Cumulative

    def _restore(self, strategy: Any, state: StrategyState) -> None:
        strategy.dataset = dataset_of(strategy.model.rows, state.rows) if state.rows else None

    def _extract(self, strategy: Any) -> dict[str, Any]:
        return {"groups": [numbers_of(strategy.dataset)]}


class JointAdapter(StateAdapter):
    """Every row so far in one experience, trained from the unedited weight."""

    template = JointTraining

    def initial_weight(self, base: Tensor, edited: Tensor) -> Tensor:
        return base

    def experience_rows(self, state: StrategyState, new: list[int]) -> list[int]:
        return [*state.rows, *new]

    def _extract(self, strategy: Any) -> dict[str, Any]:
        return {"groups": [[i for e in strategy._experiences for i in numbers_of(e.dataset)]]}


class EwcAdapter(StateAdapter):
    """The weight after the last batch (`anchor`) and the running importance of each of its numbers."""

    def _restore(self, strategy: Any, state: StrategyState) -> None:
        plugin, last = plugin_of(strategy, EWCPlugin), state.trained - 1
        plugin.saved_params[last] = _as_params(state.tensors["anchor"])
        plugin.importances[last] = _as_params(state.tensors["importance"])

    def _extract(self, strategy: Any) -> dict[str, Any]:
        plugin, last = plugin_of(strategy, EWCPlugin), strategy.clock.train_exp_counter - 1
        return {"tensors": _as_tensors({"anchor": plugin.saved_params[last], "importance": plugin.importances[last]})}


class MasAdapter(StateAdapter):
    """The weight after the last batch (`anchor`) and the running importance of each of its numbers."""

    def _restore(self, strategy: Any, state: StrategyState) -> None:
        plugin = plugin_of(strategy, MASPlugin)
        plugin.params, plugin.importance = (_as_params(state.tensors[k]) for k in ("anchor", "importance"))

    def _extract(self, strategy: Any) -> dict[str, Any]:
        plugin = plugin_of(strategy, MASPlugin)
        return {"tensors": _as_tensors({"anchor": plugin.params, "importance": plugin.importance})}


class SiAdapter(StateAdapter):
    """The importance of each number of the weight and the path integral that it grows from."""

    def _restore(self, strategy: Any, state: StrategyState) -> None:
        plugin = plugin_of(strategy, CopyingSI)
        plugin.create_syn_data(strategy.model, plugin.ewc_data, plugin.syn_data, set())
        for name, params in self._params(plugin).items():
            params["weight"].data = state.tensors[name].cpu().flatten().clone()

    def _extract(self, strategy: Any) -> dict[str, Any]:
        tensors = _as_tensors(self._params(plugin_of(strategy, CopyingSI)))
        return {"tensors": {k: v.reshape(strategy.model.weight.shape) for k, v in tensors.items()}}

    def _params(self, plugin: Any) -> dict[str, Any]:
        return {"importance": plugin.ewc_data[1], "path": plugin.syn_data["cum_trajectory"]}


class GemAdapter(StateAdapter):
    """Rows of the newest batches; the clock counts the batches of which rows are kept."""

    def restore(self, strategy: Any, state: StrategyState) -> None:
        strategy.clock.train_exp_counter = len(state.groups)
        plugin, rows = plugin_of(strategy, GEMPlugin), strategy.model.rows
        for t, group in enumerate(state.groups):
            data = dataset_of(rows, group)
            x, y, task = data.collate_fn([data[i] for i in range(len(group))])
            plugin.memory_x[t], plugin.memory_y[t], plugin.memory_tid[t] = x, y, task

    def _extract(self, strategy: Any) -> dict[str, Any]:
        groups = [x.tolist() for x in plugin_of(strategy, GEMPlugin).memory_x.values()]
        return {"groups": groups[-self.config.batches :]}


def _as_params(tensor: Tensor) -> dict[str, Any]:
    return {"weight": ParamData("weight", init_tensor=tensor.clone(), device=tensor.device)}


def _as_tensors(params: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v["weight"].data.detach().clone() for k, v in params.items()}


STRATEGIES: dict[str, tuple[type[StateAdapter], Callable[[Any], list[Any]]]] = {
    "naive": (StateAdapter, lambda c: []),
    "replay": (ReservoirAdapter, lambda c: [FlatReplay(c.memory, c.sample)]),
    "cumulative": (CumulativeAdapter, lambda c: []),
    "joint": (JointAdapter, lambda c: []),
    "ewc": (EwcAdapter, lambda c: [EWCPlugin(c.strength, mode="online", decay_factor=c.decay)]),
    "si": (SiAdapter, lambda c: [CopyingSI(c.strength, c.damping)]),
    "mas": (MasAdapter, lambda c: [MASPlugin(c.strength, c.alpha)]),
    "lwf": (StateAdapter, lambda c: [AnswerDistillation(c.strength, c.temperature)]),
    "gem": (GemAdapter, lambda c: [GEMPlugin(c.patterns, c.margin)]),
    "agem": (ReservoirAdapter, lambda c: [FlatAGEM(c.memory, c.sample)]),
}
"""By name, the adapter of a strategy and the plug-ins that its settings make."""


def adapter(name: str, config: Any) -> StateAdapter:
    """The state adapter of a strategy with these settings."""
    kind, plugins = STRATEGIES[name]
    return kind(config, plugins)


def answer_strategy(name: str, rows: AnswerRows, config: Any = None, plugins: Sequence[Any] = (), evaluator: Any = None) -> Any:
    """One of Avalanche's strategies, ready to train on the answers of a benchmark (`benchmark.rows`).

    Args:
        name: `naive`, `replay`, ... as in `--editor avalanche:NAME`.
        config: its settings (`EDITORS.get("avalanche:NAME").Config`); None is the defaults.

    Raises `BadEditor` for a name that is not offered, with the reason, and for settings out of range.
    """
    if name not in STRATEGIES:
        why = f"it cannot learn answers of several tokens: {REFUSED[name]}" if name in REFUSED else f"there are {', '.join(STRATEGIES)}"
        raise BadEditor(f"the strategy {name!r} is not offered: {why}")
    config = config or METHODS[name].config()
    if config.problems():
        raise BadEditor(f"{name}: " + "; ".join(config.problems()))
    return adapter(name, config).strategy(AnswerModel(rows), plugins, evaluator)
