"""KE, the KnowledgeEditor (De Cao et al., EMNLP 2021, arXiv 2104.08164): a network reads the edit and shapes its gradient.

The network (`ke_network.py`, equations 1 and 2) reads old answer, new answer and question, and multiplies the gradient of the new
answer's loss by row and by column, before it adds a matrix of rank one. Before the first edit it is trained, on edits that the
stream does not have, to

    minimise  -log p(answer | x, rephrasing; W + Delta W)   subject to   KL( p( | x'; W) || p( | x'; W + Delta W) ) <= m ,   (3)

with x' other edits' questions, by a Lagrangian whose multiplier rises by the constraint's violation. The margin m shrinks while the
held-out edits succeed. In a stream each edit is made at the weights as they are, one after another; the paper makes one edit, and
what a training on single edits does not learn is that the changes add up (`offset`).

The network reads the question's text alone; a picture reaches the change through the gradient. The old answer is the stream's (the
paper's is the model's prediction). The numbers of equations are this project's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from streams.base import TrainEdit, TrainPool
from testbed.core.events import EditBatch, EditEvent
from testbed.core.ranges import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from testbed.core.registry import EDITORS
from testbed.core.timing import timed
from testbed.editors.adapters.lowrank import find_target_modules
from testbed.editors.base import EditFailed, need, require_same
from testbed.editors.hyperparameters import Values
from testbed.editors.meta.examples import data_key, examples_of
from testbed.editors.meta.gradients import factors_of
from testbed.editors.meta.ke_network import CONDITION, ConditionedNetwork, embedded_conditions
from testbed.editors.meta.ke_training import KETask
from testbed.editors.meta.mend import derived
from testbed.editors.meta.training import MetaTrainingConfig, Plan, before_first_edit, cache_key, finished, trained
from testbed.editors.row_editor import RowEditor, Rows
from testbed.editors.traits import Traits
from testbed.editors.work import Work

_TOKENS = 15.0
"""Tokens of an edit's prompt and answer, for the estimate of its state."""


@dataclass(frozen=True)
class KEConfig(MetaTrainingConfig):
    """Published values are those of the released script for BART; there are none for a decoder alone, nor for a model in this table."""

    modules: str | None = None
    """Regular expression over the names of the decoder's linear maps that are edited: the MLPs of the last three layers where it is
    not given. `modules=.` is all of them, as published (embeddings, norms and biases are never edited)."""
    hidden: PositiveInt = 128
    """Numbers of an LSTM's state and in the middle of a head (published: 128)."""
    condition: PositiveInt = 1024
    """Numbers of the condition (published: 1024)."""
    scale: PositiveFloat = 1.0
    """s (published: 1 in the released script, 1e-3 in its class)."""
    start: NonNegativeFloat = 1.0
    """How far down the gradient the untrained network goes, in parts of s / 2 (published: 0, so that the training has to find the
    sign of descent)."""
    offset: bool = True
    """Add softmax(r_b) c_b^T, as published. Trained on single edits it comes out as nearly the same matrix for all of them, which a
    sequence of edits adds up; false leaves it out."""
    smoothing: Fraction = 0.1
    """Mass of the target that other tokens get (published: .1)."""
    others: PositiveInt = 3
    """Other edits of the mini-batch by whose old answers the divergence of a change is measured (published: all 63)."""
    margin: PositiveFloat = 1e-3
    """m at first, nats a token (published: 1e-3)."""
    least_margin: PositiveFloat = 1e-5
    """m at the least (published: 1e-5)."""
    margin_factor: Fraction = 0.8
    """What m is multiplied by where over nine tenths of the held-out edits succeed (published: .8, at the end of an epoch)."""
    lr: PositiveFloat = 3e-4
    """Adam's step size for the network (published: 3e-4, of RMSprop)."""
    lr_multiplier: PositiveFloat = 0.1
    """Step size of the multiplier (published: .1)."""
    train_steps: PositiveInt = 3_000
    """Optimiser steps at most (published: 200,000 of one edit on each of four GPUs)."""
    judge_every: PositiveInt = 50
    """Optimiser steps between two judgements on held-out train edits (published: an epoch)."""
    patience: PositiveInt = 20
    """Judgements in a row without a better one after which the training ends."""


@EDITORS.register("ke")
class KE(RowEditor):
    """The factors of equation 2 by edit, the trained network, and the weights that follow from the factors."""

    summary = "a network that reads old answer, new answer and question shapes the gradient of an edit (KnowledgeEditor)"
    traits = Traits(weights=True, undo=True, uses=frozenset({"train_edits", "previous"}))
    Config = KEConfig

    def _derived(self) -> Values:
        return {"modules": derived(self.handle)["modules"]}

    def work(self, batch: int) -> Work:
        """One forward and backward an edit from the first edited layer up, behind the training of the network."""
        h, targets = self.hyper, find_target_modules(self.handle, self.hyper.modules)
        layers = float(self.handle.n_layers - targets[0].layer)
        heads = sum(h.hidden * (h.condition + 2 * (t.d + t.f) + 1) for t in targets)
        width = self.handle.model.get_input_embeddings().weight.shape[1]
        numbers = float(heads + 8 * h.hidden * (width + h.hidden) + 2 * h.hidden * h.condition)
        # of each example the edit twice, its rephrasing, and other edits with and without the change
        rows = 3.0 + 2.0 * h.others
        before = before_first_edit(h, rows, layers, numbers, lambda pool: finished(self.name, self.handle, self._key(pool.edits)))
        each = _TOKENS * sum(t.f + t.d for t in targets)
        return Work(before=before, forwards=1.0, steps=float(batch), rows=1.0 / batch, layers=layers, state=numbers, state_per_edit=each)

    def _prepare(self, pool: TrainPool) -> None:
        targets = find_target_modules(self.handle, self.hyper.modules)
        examples = examples_of(self.handle, pool.edits, self.config.held_out)
        network = ConditionedNetwork.fresh(self.handle, targets, self.hyper)
        task = KETask(self.handle, targets, network, examples, self.hyper)
        done = trained(task, Plan.of(self.name, self.hyper), self.handle, self._key(pool.edits))
        self.network = network.with_tensors(done.best)
        self.notes.append(f"meta-training on {examples.summary}: {done.note}")
        if unknown := sum(e.event.previous is None for e in examples.train):
            self.notes.append(f"{unknown:,} of {len(examples.train):,} train edits name no old answer: the network reads an empty one")
        self._start(targets)

    def _key(self, edits: Sequence[TrainEdit]) -> str:
        """What the training depends on."""
        olds = [e.event.previous for e in edits]
        return cache_key(self.handle, data_key(edits), olds, asdict(self.hyper))

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        """One edit after another; the note counts those whose old answer the stream does not know."""
        for event in batch.events:
            self._add([event])
        unknown = sum(e.previous is None for e in batch.events)
        return {"without_old_answer": float(unknown)} if unknown else {}

    @timed("change")
    @torch.no_grad()
    def _rows_of(self, events: Sequence[EditEvent]) -> Rows:
        """Equation 2 in its factors for one edit, with the gradient under the weights as they are."""
        (event,) = events
        with self.handle.swapped(self.edited_weights()):
            factors = factors_of(self.handle, self.targets, [event.ask()], [event.target])
        text = CONDITION.format(old=event.previous or "", new=event.target, prompt=event.prompt)
        pairs = self.network.changed(self.network.condition(*embedded_conditions(self.handle, [text])), factors)
        if not all(bool(torch.isfinite(side).all()) for pair in pairs for side in pair):
            raise EditFailed("the network made a change of the weights that is not finite")
        return Rows(tuple(left[0] for left, _ in pairs), tuple(right[0] for _, right in pairs), (event.id,) * pairs[0][0].shape[1])

    def _changes_of(self, rows: Rows) -> list[Tensor]:
        return [g.double().mT @ h.double() for h, g in zip(rows.h, rows.g)]

    def _state(self) -> dict[str, Any]:
        return {**super()._state(), **self.network.state()}

    def _load(self, state: dict[str, Any]) -> None:
        require_same(state, self._own())
        own = self.network.state()
        self.network = self.network.with_tensors(
            {n.removeprefix("net."): need(state, n, tuple(t.shape)).to(t.device) for n, t in own.items()}
        )
        super()._load(state)
