# pyright: strict
"""What an editor has a model do, in counts of pieces of work: the dry run times one piece of each kind and multiplies.

The counts follow from the fields that hyper-parameters share (`steps`, `layer` or `layers`, `rank`, `contexts`, `k`,
`demonstrations`, `corpus`). An editor whose cost they do not tell overrides `Editor.work`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from streams.base import TrainPool
from testbed.editors.traits import Traits
from testbed.model.handle import ModelHandle, as_matrix

_FACTS = 5
"""Facts before a question where the hyper-parameters leave their number to the prompt template."""
_TOKENS_A_DIRECTION = 15
"""Tokens of general text for each direction of the key space, from which second moments are estimated."""
_DOWN = 0.5
"""Work of a training step at the trained down-projection itself, in layers."""


@dataclass(frozen=True)
class TrainingBefore:
    """Counts of a training before the first edit, which may end sooner. A row is the prompt of an edit with its answer."""

    steps: float
    """Optimiser steps at most."""
    rows: float
    """Rows in each step, those of its judgements included, that the whole model reads once."""
    layers: float
    """Decoder layers that each row runs forward and back, below the head."""
    trained: float
    """Numbers that the optimiser moves in each step."""
    seconds: float
    """Budget of CPU seconds at which it ends."""
    is_cached: Callable[[TrainPool], bool]
    """Whether this training on the train edits of a pool is finished and cached, so that a run skips it."""


@dataclass(frozen=True)
class Work:
    """Counts of an editor on one model. A row is the prompt of an edit with its answer."""

    text_tokens: float = 0.0
    """Tokens of general text that the model reads before the first edit."""
    eigen: tuple[int, ...] = ()
    """Orders of the symmetric matrices that are decomposed before the first edit."""
    before: TrainingBefore | None = None
    """A training before the first edit; None for a method without one."""
    forwards: float = 1.0
    """Rows an edit that the whole model reads once."""
    steps: float = 0.0
    """Training steps of a batch, which all its edits share."""
    rows: float = 1.0
    """Rows an edit in each training step."""
    layers: float = 0.0
    """Decoder layers that a training step runs forward and back, below the head."""
    trained: float = 0.0
    """Numbers that the optimiser moves in each step, whatever the batch."""
    trained_per_edit: float = 0.0
    """Numbers that it moves beside them for each edit of the batch."""
    solves: tuple[int, ...] = ()
    """Orders of the linear systems that are solved for a batch."""
    asked: float = 1.0
    """Questions that the model answers for each question that is asked; 0 where the stored answers of the unedited model stand."""
    facts: float = 0.0
    """Facts, each as long as the text of an edit with its answer, before each question."""
    state: float = 0.0
    """Numbers of the state before the first edit."""
    state_per_edit: float = 0.0
    """Numbers that each edit adds to it."""


def derived_work(handle: ModelHandle, hyper: object, traits: Traits) -> Work:
    """The counts of an editor with these hyper-parameters, of which only the fields named above are read."""
    fields = vars(hyper)
    if traits.learns == "no":
        return Work(forwards=0.0, asked=float(traits.told_truth))
    if traits.learns == "context":
        facts = fields.get("demonstrations") or fields.get("k") or _FACTS
        return Work(forwards=0.0, asked=2.0 if traits.gated else 1.0, facts=float(facts))
    if fields.get("layers"):
        return _solved(handle, fields)
    return _trained(handle, fields, alone=traits.gated and traits.undo)


def _trained(handle: ModelHandle, fields: dict[str, Any], alone: bool) -> Work:
    """Training of one down-projection, jointly for all edits or, with `alone`, of one of its own for each edit."""
    layer = fields.get("layer")
    layer = handle.layer_index(-1 if layer is None else layer)
    d, f = down_shape(handle, layer)
    rank = fields.get("rank") or 0
    numbers = float(rank * (d + f) if rank else d * f)
    shared, own = (0.0, numbers) if alone else (numbers, 0.0)
    above = handle.n_layers - 1 - layer
    return Work(
        forwards=2.0,
        steps=float(fields.get("steps") or 0),
        layers=above + _DOWN,
        trained=shared,
        trained_per_edit=own,
        state=shared,
        state_per_edit=own,
    )


def _solved(handle: ModelHandle, fields: dict[str, Any]) -> Work:
    """Locate-then-edit: a target is trained above the last critical layer, and every critical layer's weights are solved for."""
    layers, contexts = fields["layers"], fields.get("contexts") or 0
    d, f = down_shape(handle, layers[-1])
    text = "corpus" in fields
    return Work(
        text_tokens=float(_TOKENS_A_DIRECTION * f) if text else 0.0,
        eigen=(f,) * len(layers) if text else (),
        forwards=2.0 * (contexts + 1),
        steps=float(fields.get("steps") or 0),
        rows=contexts + 2.0,
        layers=float(handle.n_layers - 1 - layers[-1]),
        trained_per_edit=float(d),
        solves=(f,) * len(layers),
        state=float(len(layers) * d * f),
    )


def down_shape(handle: ModelHandle, layer: int) -> tuple[int, int]:
    """(d, f) of the down-projection of a layer."""
    d, f = as_matrix(handle.down(layer), handle.parameter(handle.down_weight(layer))).shape
    return int(d), int(f)
