"""Rows as Avalanche's datasets, and plug-ins that replace those of Avalanche that do not work on answers.

This module is private to its package because it imports Avalanche, which the scan for editors must not.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from avalanche.benchmarks import DatasetExperience
from avalanche.benchmarks.utils import AvalancheDataset
from avalanche.benchmarks.utils.data_attribute import TaskLabels
from avalanche.benchmarks.utils.flat_data import ConstantSequence
from avalanche.training.plugins import ReplayPlugin, SupervisedPlugin, SynapticIntelligencePlugin
from avalanche.training.plugins.agem import AGEMPlugin
from avalanche.training.storage_policy import ReservoirSamplingBuffer
from torch import Tensor
from torch.nn.functional import kl_div

from testbed.editors.base import EditFailed
from testbed.editors.continual.rows import IGNORE, AnswerRows, collate_rows


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
