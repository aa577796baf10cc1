"""MEND (Mitchell et al., ICLR 2022, arXiv 2110.11309): a small network turns the gradient of an edit into the change of the weights.

At each edited weight W (d, f) and position t of the edit's prompt and answer, the gradient is delta_t u_t^T (equation 1 in
`gradients.py`). Both factors are normalised by their means and deviations over the train edits, put behind one another, and passed
through two blocks that begin as the identity; the blocks belong to a shape of weights, s and o to a weight:

    z = [ (u - mean_u) / dev_u ; (delta - mean_delta) / dev_delta ]                                     (2)
    z <- z + max(0, s * (U V z + b) + o)          twice, with U = 0, b = 0, s = 1, o = 0 at first        (3)
    W <- W - alpha sum_t delta~_t u~_t^T          with [u~ ; delta~] the last z                          (4)

Network, s, o and alpha are trained before the first edit, on edits that the stream does not have, by

    c_edit (-log p(answer | rephrasing; W after)) + c_loc KL(p( | x_loc; W) || p( | x_loc; W after)) ,   (5)

where nothing but alpha, s, o and the network takes part in the gradient. In a stream the same network is applied to the weights as
they are, edit after edit. `retrain=true` trains it again on the edited model every `retrain_after` edits (MEND* in RLEdit's tables).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from streams.base import TrainEdit, TrainPool
from testbed.core.events import Ask, EditBatch
from testbed.core.ranges import NonNegativeFloat, PositiveFloat, PositiveInt
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.adapters.lowrank import find_target_modules
from testbed.editors.base import EditFailed, WeightEditor, need, require_same
from testbed.editors.hyperparameters import GPT2_XL, LLAMA_2_7B, PublishedRow, Table, Values
from testbed.editors.meta.examples import data_key, examples_of
from testbed.editors.meta.gradients import factors_of
from testbed.editors.meta.mend_network import MendNetwork
from testbed.editors.meta.mend_training import MendTask
from testbed.editors.meta.training import MetaTrainingConfig, Plan, Training, advance_to, before_first_edit, cache_key, finished, trained
from testbed.editors.traits import Traits
from testbed.editors.work import Work, down_shape
from testbed.model.handle import ModelHandle, as_stored

_TRAINED: Values = {"rank": 1920, "lr": 1e-6, "lr_alpha": 1e-4, "alpha": 1e-4, "train_steps": 100_000, "judge_every": 1_000}
"""What EasyEdit's files for MEND agree on."""
PUBLISHED: Table = {
    GPT2_XL: PublishedRow("EasyEdit, hparams/MEND/gpt2-xl.yaml", {**_TRAINED, "modules": r"\.h\.4[567]\.mlp\.c_(fc|proj)$"}),
    LLAMA_2_7B: PublishedRow(
        "EasyEdit, hparams/MEND/llama-7b.yaml", {**_TRAINED, "modules": r"layers\.(29|30|31)\.mlp\.(gate|up|down)_proj$"}
    ),
}
_BLOCKS = 3
"""Decoder layers, counted from the last, whose MLP is edited in a model without a published row (published: three)."""
_RANK_SHARE = 1920 / 18432
"""Share of d + f that the published rank is on Llama-2-7B."""


def derived(handle: ModelHandle) -> Values:
    """For a model without published values: the linear maps beside and including the down-projections of the last three layers."""
    names = [
        handle.down_weight(i).removesuffix(".weight").rpartition(".")[0] for i in range(max(0, handle.n_layers - _BLOCKS), handle.n_layers)
    ]
    pattern = "^(" + "|".join(n.replace(".", r"\.") for n in names) + r")\.[^.]+$"
    d, f = down_shape(handle, -1)
    return {"modules": pattern, "rank": max(8, round(_RANK_SHARE * (d + f)))}


@dataclass(frozen=True)
class MendConfig(MetaTrainingConfig):
    """Fields that are None come from the hyper-parameters of the model."""

    modules: str | None = None
    """Regular expression over the names of the decoder's linear maps that are edited (published: the MLPs of the last three layers)."""
    rank: PositiveInt | None = None
    """Rank of U V (published: 1920)."""
    alpha: PositiveFloat | None = None
    """alpha before training (published: 1e-4)."""
    lr: PositiveFloat | None = None
    """Adam's step size for U, V, b, s and o (published: 1e-6)."""
    lr_alpha: PositiveFloat | None = None
    """Adam's step size for alpha (published: 1e-4)."""
    c_edit: PositiveFloat = 0.1
    """c_edit (published: 0.1)."""
    c_loc: NonNegativeFloat = 1.0
    """c_loc (published: 1)."""
    normalise: bool = True
    """Equation 2; false leaves u and delta as they are."""
    normalise_over: PositiveInt = 512
    """Train edits from which means and deviations are computed, at most (published: all, while the training runs)."""
    edits_at_once: PositiveInt = 1
    """Edits whose changes are added up at one state of the weights, in training and in the stream (published: 1, and up to 125)."""
    train_steps: PositiveInt | None = None
    """Optimiser steps at most (published: 100,000 examples)."""
    judge_every: PositiveInt | None = None
    """Optimiser steps between two judgements on held-out train edits (published: 1,000)."""
    patience: PositiveInt = 20
    """Judgements in a row without a better one after which the training ends (published: 20)."""
    retrain: bool = False
    """Train again on the edited model."""
    retrain_after: PositiveInt = 50
    """Edits between two such trainings."""
    retrain_steps: PositiveInt = 200
    """Optimiser steps of each of them."""


@EDITORS.register("mend")
class Mend(WeightEditor):
    """Float32 weights, which each edit changes by equation 4, and the trained network."""

    summary = "a network trained on other edits turns an edit's gradient into a change of weights (MEND)"
    traits = Traits(weights=True, uses=frozenset({"train_edits"}))
    Config = MendConfig
    published, defaults = PUBLISHED, {**_TRAINED, "alpha": 5e-4, "lr": 1e-3, "train_steps": 3_000, "judge_every": 50}

    def _derived(self) -> Values:
        return derived(self.handle)

    def work(self, batch: int) -> Work:
        """One forward and backward from the first edited layer up for each `edits_at_once` edits, behind the training of the network."""
        targets = find_target_modules(self.handle, self.hyper.modules)
        parts = -(-batch // self.config.edits_at_once)
        numbers = float(sum(t.d * t.f for t in targets))
        layers = float(self.handle.n_layers - targets[0].layer)
        networks = 4.0 * self.hyper.rank * sum(d + f for d, f in {(t.d, t.f) for t in targets})
        # of each example the edit, its rephrasing and the other question
        rows = 3.0 * self.config.edits_at_once
        before = before_first_edit(self.hyper, rows, layers, networks, lambda pool: finished(self.name, self.handle, self._key(pool.edits)))
        return Work(before=before, forwards=1.0, steps=float(parts), rows=1.0 / parts, layers=layers, state=numbers)

    def _prepare(self, pool: TrainPool) -> None:
        self.targets = find_target_modules(self.handle, self.hyper.modules)
        self.weights = tuple(self.handle.parameter(t.weight).detach().float() for t in self.targets)
        self.since, self.edits = 0, pool.edits
        network = MendNetwork.fresh(self.handle, self.targets, self.hyper)
        task = self._task(network, self.edits)
        done = trained(task, Plan.of(self.name, self.hyper), self.handle, self._key(self.edits))
        self.network = network.with_tensors(done.best, done.fixed)
        self.notes.append(f"meta-training on {task.examples.summary}: {done.note}")

    def _task(self, network: MendNetwork, edits: Sequence[TrainEdit]) -> MendTask:
        """The training of a network on train edits. Raises `BadEditor` where they are of fewer than two entities."""
        examples = examples_of(self.handle, edits, self.config.held_out)
        return MendTask(self.handle, self.targets, network, examples, self.hyper)

    def _key(self, edits: Sequence[TrainEdit]) -> str:
        """What the training depends on: not on what is done with the network later."""
        later = ("retrain", "retrain_after", "retrain_steps")
        return cache_key(self.handle, data_key(edits), {k: v for k, v in asdict(self.hyper).items() if k not in later})

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        notes: dict[str, float] = {}
        if self.config.retrain and self.since >= self.config.retrain_after:
            notes = self._retrain(batch.step)
        size = self.config.edits_at_once
        for at in range(0, len(batch), size):
            events = batch.events[at : at + size]
            self._change([e.ask() for e in events], [e.target for e in events])
        self.since += len(batch)
        return notes

    @timed("change")
    def _change(self, asks: Sequence[Ask], answers: Sequence[str]) -> None:
        """Equation 4, with the gradients under the weights as they are. Raises `EditFailed` where a number is not finite."""
        with self.handle.swapped(self.edited_weights()):
            factors = factors_of(self.handle, self.targets, asks, answers)
        with torch.no_grad():
            pairs = self.network.changed(factors)
            changes = [right.flatten(0, 1).mT @ left.flatten(0, 1) for left, right in pairs]
        if not all(bool(torch.isfinite(c).all()) for c in changes):
            raise EditFailed("the network made a change of the weights that is not finite: an alpha of the training is too large")
        self.weights = tuple(w + as_stored(t.module, c) for w, t, c in zip(self.weights, self.targets, changes))

    @timed("retrain")
    def _retrain(self, step: int) -> dict[str, float]:
        """Train the network again, with the edited model as the model that is edited. Its steps alone end it, not its time."""
        task = self._task(self.network.copy(), self.edits)
        plan = Plan(self.name, self.config.retrain_steps, torch.inf, self.config.retrain_steps, 1, self.hyper.clip, self.seed + step)
        adam = torch.optim.Adam([{"params": [t], "lr": task.rate(name)} for name, t in task.tensors.items()])
        training = Training()
        with self.handle.swapped(self.edited_weights()):
            advance_to(task, plan, adam, training, lambda: None)
        self.network, self.since = task.network.with_tensors(training.best), 0
        return {"retrained_from": training.curve[0]["loss"], "retrained_to": training.lowest}

    def edited_weights(self) -> dict[str, Tensor]:
        return {t.weight: w for t, w in zip(self.targets, self.weights)}

    def _own(self) -> dict[str, Any]:
        return {"model": self.handle.hash, "modules": [t.name for t in self.targets]}

    def _state(self) -> dict[str, Any]:
        weights = {f"weight.{i}": w for i, w in enumerate(self.weights)}
        return {**weights, **self.network.state(), "since": self.since, **self._own()}

    def _load(self, state: dict[str, Any]) -> None:
        require_same(state, self._own())
        self.weights = tuple(need(state, f"weight.{i}", tuple(w.shape)).to(w.device) for i, w in enumerate(self.weights))
        stored = {name: need(state, name, tuple(t.shape)).to(t.device) for name, t in self.network.state().items()}
        self.network, self.since = self.network.loaded(stored), state["since"]
