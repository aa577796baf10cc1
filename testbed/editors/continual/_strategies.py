"""Avalanche's strategies: rows as its datasets, plug-ins in place of those that do not work on answers, and state adapters.

A state adapter builds a strategy and moves its state in and out as plain tensors. Each batch of edits gets a new
strategy, to which the state after the last batch is restored. Nothing is kept in the strategy object itself, so a
stopped run continues bit-identically, and an edit that fails changes nothing.

This module is private to its package because it imports Avalanche, which the scan for editors must not.
"""

from __future__ import annotations

import random
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from avalanche.benchmarks import DatasetExperience
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.data_attribute import TaskLabels
from avalanche.benchmarks.utils.flat_data import ConstantSequence
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, MASPlugin, ReplayPlugin, SupervisedPlugin, SynapticIntelligencePlugin
from avalanche.training.plugins.agem import AGEMPlugin
from avalanche.training.plugins.gem import GEMPlugin
from avalanche.training.storage_policy import ReservoirSamplingBuffer
from avalanche.training.supervised import Cumulative, JointTraining
from avalanche.training.templates import SupervisedTemplate
from avalanche.training.utils import ParamData
from torch import Tensor
from torch.nn.functional import kl_div

from testbed.editors.base import BadEditor, EditFailed
from testbed.editors.continual.methods import METHODS, REFUSED
from testbed.editors.continual.rows import IGNORE, AnswerModel, AnswerRows, answer_loss, collate_rows


def dataset_of(rows: AnswerRows, numbers: Sequence[int]) -> Any:
    """An Avalanche dataset of these rows, all with task label 0."""
    samples: Any = [(torch.tensor(i), rows.labels[i]) for i in numbers]
    return AvalancheDataset([samples], data_attributes=[TaskLabels(ConstantSequence(0, len(numbers)))], collate_fn=collate_rows)


def numbers_of(dataset: Any) -> list[int]:
    """The row numbers of a dataset, in the order of its samples."""
    return [int(dataset[i][0]) for i in range(len(dataset))]


def experience_of(rows: AnswerRows, numbers: Sequence[int]) -> Any:
    """An experience of these rows that belongs to no stream.

    It has task labels, because without them Avalanche makes a plain loader, which ignores the dataset's `collate_fn`.
    """
    out = DatasetExperience(dataset=dataset_of(rows, numbers), current_experience=0)
    out.task_labels = [0]
    return out


def plugin_of(strategy: Any, kind: Any) -> Any:
    """The plug-in of a strategy that is an instance of this class, or of one of these classes."""
    return next(p for p in strategy.plugins if isinstance(p, kind))


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Seed the global generators of torch and `random` with a draw from `generator`, and restore them afterwards.

    Avalanche shuffles with `random`, and its reservoirs and torch's loaders draw from torch's generator; none of them
    takes a generator of ours. Seeding here makes a step reproducible and leaves the generators of the caller as they were.
    """
    seed = int(torch.randint(2**31, (), generator=generator))
    before = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before)


class StepLimiter(SupervisedPlugin):
    """Trains each experience for a number of steps with a new optimiser state; raises `EditFailed` where the loss is not finite."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.done, self.loss = steps, 0, float("nan")

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        strategy.optimizer.state = defaultdict(dict)
        strategy._stop_training = False  # a stop at the very last step would skip the next experience
        self.done = 0

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.loss = float(strategy.loss.detach())
        if not torch.isfinite(strategy.loss).all():
            raise EditFailed(f"the loss became {self.loss} after {self.done} steps; try a smaller lr or strength")

    def after_training_iteration(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.done += 1
        if self.done >= self.steps:
            strategy.stop_training()


class AnswerDistillation(SupervisedPlugin):
    """Learning without forgetting (Li and Hoiem 2016) for answers, with the model before the batch as the teacher.

    Adds strength * T^2 * KL(teacher || model), mean over the tokens of an answer and then over rows. Avalanche's own
    plug-in would take the positions of a sequence for classes.
    """

    def __init__(self, strength: float, temperature: float) -> None:
        super().__init__()
        self.strength, self.temperature = strength, temperature

    def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.teacher = strategy.model.weight.detach().clone()

    def before_backward(self, strategy: Any, *args: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            teacher = torch.func.functional_call(strategy.model, {"weight": self.teacher}, (strategy.mb_x,))
        soft, own = ((x / self.temperature).log_softmax(1) for x in (teacher, strategy.mb_output))
        real = strategy.mb_y != IGNORE
        token = kl_div(own, soft, reduction="none", log_target=True).sum(1) * real
        strategy.loss += self.strength * self.temperature**2 * (token.sum(1) / real.sum(1)).mean()


class FlatReplay(ReplayPlugin):
    """Replay from one reservoir of all edits; Avalanche's default divides the buffer among the past experiences."""

    def __init__(self, size: int, sample: int) -> None:
        super().__init__(size, batch_size_mem=sample, storage_policy=ReservoirSamplingBuffer(size))

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.storage_policy.post_adapt(strategy, strategy.experience)  # the inherited method calls a deprecated one, which warns each time


class FlatAGEM(AGEMPlugin):
    """A-GEM with one reservoir of all edits, as in its paper; Avalanche's loader needs a sample for each past experience."""

    def __init__(self, size: int, sample: int) -> None:
        super().__init__(size, sample)
        self.storage_policy = ReservoirSamplingBuffer(size)

    def update_memory(self, dataset: Any, *args: Any, **kwargs: Any) -> None:
        self.storage_policy.update_from_dataset(dataset)
        self.buffers = [self.storage_policy.buffer]

    def sample_from_memory(self) -> list[Tensor]:
        buffer = self.storage_policy.buffer
        chosen = torch.randperm(len(buffer))[: self.sample_size]
        return collate_rows([buffer[int(i)] for i in chosen])


class CopyingSI(SynapticIntelligencePlugin):
    """Synaptic intelligence (Zenke et al. 2017) that also works on a CPU.

    There Avalanche keeps views of the live weights, so that no weight seems to move and every importance is 0.
    """

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        super().before_training_exp(strategy, **kwargs)
        _copy(self.ewc_data[0])

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        super().before_training_iteration(strategy, **kwargs)
        _copy(self.syn_data["old_theta"])


def _copy(params: Any) -> None:
    for p in params.values():
        p.data = p.data.clone()


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


class AnchorAdapter(StateAdapter):
    """The weight after the last batch (`anchor`) and the running importance of each of its numbers (EWC, MAS)."""

    def _holders(self, strategy: Any, last: int) -> dict[str, tuple[Any, Any]]:
        """Where the plug-in keeps each: a mapping and its key."""
        plugin = plugin_of(strategy, (EWCPlugin, MASPlugin))
        if isinstance(plugin, EWCPlugin):
            return {"anchor": (plugin.saved_params, last), "importance": (plugin.importances, last)}
        return {"anchor": (vars(plugin), "params"), "importance": (vars(plugin), "importance")}

    def _restore(self, strategy: Any, state: StrategyState) -> None:
        for name, (holder, key) in self._holders(strategy, state.trained - 1).items():
            holder[key] = _as_params(state.tensors[name])

    def _extract(self, strategy: Any) -> dict[str, Any]:
        holders = self._holders(strategy, strategy.clock.train_exp_counter - 1)
        return {"tensors": _as_tensors({name: holder[key] for name, (holder, key) in holders.items()})}


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
    "ewc": (AnchorAdapter, lambda c: [EWCPlugin(c.strength, mode="online", decay_factor=c.decay)]),
    "si": (SiAdapter, lambda c: [CopyingSI(c.strength, c.damping)]),
    "mas": (AnchorAdapter, lambda c: [MASPlugin(c.strength, c.alpha)]),
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
