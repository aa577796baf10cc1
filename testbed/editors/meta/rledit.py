"""RLEdit (Li et al., ICML 2025, arXiv 2502.05759): MALMEN's network, trained over whole trajectories of edits.

The network (`malmen_network.py`) turns the inputs and gradients of a batch's answer tokens into one change of each weight, by a
ridge regression. Before the first edit it is trained on edits that the stream does not have, made one batch after another from the
unedited weights W_0 on. With W_t the weights behind batch t, the loss of a trajectory of T batches is

    sum_t [ sum_{k < depth} mu^k ( L_edit(t - k) + c_loc L_loc(t - k) ) + eta |W_t - W_{t-1}|^2 ] ,      (1)

    L_edit(j) = -log p(answer | rephrasing; W_t),   L_loc(j) = KL( p( | x_loc; W_{t-1}) || p( | x_loc; W_t) ),

means over the edits of batch j: each step asks again for the edits of the steps before it, the older the lighter. Nothing but the
step's own change takes part in its gradient. In a stream each batch is made at once, at the weights as they are; means and
deviations of inputs and gradients go on to be counted.

`trajectory=1` is the training of MALMEN (Tan et al., ICLR 2024, arXiv 2311.04661), which knows one batch at the unedited weights.
The numbers of equations are this file's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from streams.base import TrainEdit, TrainPool
from testbed.core.events import EditEvent
from testbed.core.ranges import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.adapters.lowrank import find_target_modules
from testbed.editors.base import EditFailed, need, require_same
from testbed.editors.hyperparameters import GPT_J, LLAMA_3_8B, MISTRAL_7B, PublishedRow, Table, Values
from testbed.editors.meta.examples import data_key, examples_of
from testbed.editors.meta.gradients import answer_rows
from testbed.editors.meta.malmen_network import MalmenNetwork
from testbed.editors.meta.mend import derived as last_blocks
from testbed.editors.meta.rledit_training import RLEditTask
from testbed.editors.meta.training import MetaTrainingConfig, Plan, before_first_edit, cache_key, finished, trained
from testbed.editors.row_editor import RowEditor, Rows
from testbed.editors.traits import Traits
from testbed.editors.work import Work, down_shape
from testbed.model.handle import ModelHandle

_TRAINED: Values = {"rank": 1024, "alpha": 1e-6, "lr": 1e-5, "lr_alpha": 1e-5, "trajectory": 400, "c_loc": 0.6}
"""RLEdit's released file for all models, and the 400 batches of its main experiment."""
_FILES = "RLEdit's released files, config/editor/rledit.yaml and config/model"
PUBLISHED: Table = {
    LLAMA_3_8B: PublishedRow(_FILES, {**_TRAINED, "modules": r"layers\.(2[2-9]|30)\.mlp\.(gate|up)_proj$"}),
    MISTRAL_7B: PublishedRow(_FILES, {**_TRAINED, "c_loc": 0.8, "modules": r"layers\.(2[2-9]|3[01])\.mlp\.up_proj$"}),
    GPT_J: PublishedRow(_FILES, {**_TRAINED, "modules": r"\.h\.2[2-7]\.mlp\.fc_out$"}),
}
_RANK_SHARE = 1024 / 18432
"""Share of d + f that the published rank is on Llama-3-8B."""
_TOKENS = 4.0
"""Answer tokens of an edit, for the estimate of its cost."""


def derived(handle: ModelHandle) -> Values:
    """For a model without published values: MEND's choice of maps, and the published rank's share of their width."""
    d, f = down_shape(handle, -1)
    return {"modules": last_blocks(handle)["modules"], "rank": max(8, round(_RANK_SHARE * (d + f)))}


@dataclass(frozen=True)
class RLEditConfig(MetaTrainingConfig):
    """Fields that are None come from the hyper-parameters of the model. `train_batch` is a batch of a trajectory (published: 20)."""

    modules: str | None = None
    """Regular expression over the names of the decoder's linear maps that are edited (published for Llama-3: gate and up
    projections of layers 22 to 30)."""
    rank: PositiveInt | None = None
    """Rank of U V (published: 1024; MALMEN 1920)."""
    blocks: PositiveInt = 4
    """Residual blocks (published: 4; MALMEN 2)."""
    alpha: PositiveFloat | None = None
    """alpha before training (published: 1e-6)."""
    lr: PositiveFloat | None = None
    """Adam's step size for the network and lambda (published: 1e-5)."""
    lr_alpha: PositiveFloat | None = None
    """Adam's step size for alpha (published: 1e-5)."""
    trajectory: PositiveInt | None = None
    """T: batches that are made one after another in one optimiser step (published: 400, as many as the stream has); 1 is MALMEN."""
    discount: Fraction = 0.95
    """mu (published: .95)."""
    depth: PositiveInt = 10
    """Batches that a step asks for, its own included (published: 10)."""
    c_loc: NonNegativeFloat | None = None
    """c_loc (published: .6, for Mistral .8; MALMEN 1)."""
    weight_decay: NonNegativeFloat = 1e-4
    """eta (published: 1e-4; MALMEN 0)."""
    clip: PositiveFloat = 1.0
    """Largest norm of a trajectory's gradient (published: 1, after each of its steps)."""
    lifelong: bool = True
    """Go on with means and deviations in the stream, as the released code does; false leaves them as the training left them."""
    normalise_over: PositiveInt = 512
    """Train edits on which means and deviations stand before the training, at most (published: all, while the training runs)."""
    train_steps: PositiveInt | None = None
    """Optimiser steps at most, a trajectory each."""
    judge_every: PositiveInt | None = None
    """Optimiser steps between two judgements on held-out train edits."""
    patience: PositiveInt = 10
    """Judgements in a row without a better one after which the training ends."""


@EDITORS.register("rledit")
class RLEdit(RowEditor):
    """Inputs and gradients of every edit's answer tokens, the trained network, and the weights that follow from both."""

    summary = "a network trained over trajectories of edits, and a ridge regression a batch (RLEdit, MALMEN)"
    traits = Traits(weights=True, undo=True, uses=frozenset({"train_edits"}))
    Config = RLEditConfig
    published = PUBLISHED
    defaults = {**_TRAINED, "alpha": 1e-3, "lr": 1e-4, "lr_alpha": 1e-4, "trajectory": 8, "train_steps": 400, "judge_every": 20}

    def _derived(self) -> Values:
        return derived(self.handle)

    def work(self, batch: int) -> Work:
        """One forward and backward a batch from the first edited layer up and a solve, behind the training of the network."""
        h, targets = self.hyper, find_target_modules(self.handle, self.hyper.modules)
        layers = float(self.handle.n_layers - targets[0].layer)
        networks = 2.0 * h.blocks * h.rank * sum(d + f for d, f in {(t.d, t.f) for t in targets})
        # of each example of a trajectory the edit, and in each step that asks for it its rephrasing and the other question, twice
        rows = h.trajectory * (1.0 + 3.0 * min(h.depth, (h.trajectory + 1) / 2))
        before = before_first_edit(h, rows, layers, networks, lambda pool: finished(self.name, self.handle, self._key(pool.edits)))
        each = _TOKENS * sum(t.f + t.d for t in targets)
        return Work(before=before, forwards=1.0, steps=1.0, layers=layers, state=networks, state_per_edit=each)

    def _prepare(self, pool: TrainPool) -> None:
        targets = find_target_modules(self.handle, self.hyper.modules)
        examples = examples_of(self.handle, pool.edits, self.config.held_out)
        network = MalmenNetwork.fresh(self.handle, targets, self.hyper)
        task = RLEditTask(self.handle, targets, network, examples, self.hyper)
        done = trained(task, Plan.of(self.name, self.hyper), self.handle, self._key(pool.edits))
        self.network = network.with_tensors(done.best, done.fixed)
        self.notes.append(f"meta-training on {examples.summary}: {done.note}")
        self._start(targets)

    def _key(self, edits: Sequence[TrainEdit]) -> str:
        """What the training depends on: not on what is done with the network later."""
        return cache_key(self.handle, data_key(edits), {k: v for k, v in asdict(self.hyper).items() if k != "lifelong"})

    @timed("backward")
    def _rows_of(self, events: Sequence[EditEvent]) -> Rows:
        """Inputs and gradients at the positions that predict the answers' tokens; no row of one edit depends on another edit."""
        with self.handle.swapped(self.edited_weights()):
            keys, deltas, row = answer_rows(self.handle, self.targets, [e.ask() for e in events], [e.target for e in events])
        return Rows(tuple(keys), tuple(deltas), tuple(events[i].id for i in row))

    @torch.no_grad()
    def _changes_of(self, rows: Rows) -> list[Tensor]:
        """The network's change for the rows of a batch, which the statistics count first."""
        if self.config.lifelong:
            pairs = (torch.cat([h, g], -1) for h, g in zip(rows.h, rows.g))
            self.statistics = [s.with_rows(pair) for s, pair in zip(self.statistics, pairs)]
            network = self.network.normalised_by(self.statistics)
        else:
            network = self.network
        changes = network.changes_of(rows.h, rows.g)
        if not all(bool(torch.isfinite(c).all()) for c in changes):
            raise EditFailed("the network made a change of the weights that is not finite: an alpha of the training is too large")
        return [c.to(base.device) for c, base in zip(changes, self.bases)]

    def _restart(self) -> None:
        self.statistics = self.network.counted()

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), **self.network.state()}

    def _load(self, state: dict[str, Any]) -> None:
        require_same(state, self._own())
        stored = {name: need(state, name, tuple(t.shape)).to(t.device) for name, t in self.network.state().items()}
        self.network = self.network.loaded(stored)
        super()._load(state)
