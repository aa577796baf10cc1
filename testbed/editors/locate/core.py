"""The core of all locate-then-edit methods (ROME, MEMIT, AlphaEdit, EMMET, PMET and what wraps them).

Each edit gets a target: what one layer should put out where the prompt's subject ends, so that the model gives
the new answer. Then every critical layer's down-projection takes its share of the way there by a ridge solve,
`Delta = R K^T (A0 + H + K K^T)^-1`. A method is a choice of prior A0, history H, share of the residual and
layers. The lookup position is the last token of the subject where the prompt names it, else the prompt's last token.

Two edits of one fact in a batch: the later one is made. Two edits of other facts with nearly the same key are
both made, at the mean where they conflict, and counted as `collisions`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import EditBatch, EditEvent
from testbed.core.timing import stage
from testbed.editors.base import BadEditor, EditFailed, Editor, EditorConfig, Traits
from testbed.editors.locate.corpus import corpus_of
from testbed.editors.locate.hyperparameters import Hyper, hyper_of, overlaid
from testbed.editors.locate.keys import Sweep
from testbed.editors.locate.positions import ask_of, draw_contexts, subject_of
from testbed.editors.locate.second_moments import second_moments
from testbed.editors.locate.solver import Prior, Ridge, Solution
from testbed.editors.locate.targets import Found, Task, heights, search
from testbed.editors.locate.weight_changes import Changes
from testbed.model.predictor import ModelPredictor, Predictor
from testbed.model.suffix import capture

_SAME_KEY = 0.98
"""Cosine from which two keys of a batch count as colliding."""


@dataclass(frozen=True)
class LocateConfig(EditorConfig):
    """Fields that are None come from the table of hyper-parameters by model (`_locate_hyper.py`)."""

    layers: tuple[int, ...] | None = None
    """Critical layers whose down-projections change, in rising order."""
    steps: int | None = None
    """v_num_grad_steps: evaluations of the target's loss."""
    lr: float | None = None
    """v_lr: Adam's step size of the target."""
    decay: float | None = None
    """v_weight_decay."""
    clamp: float | None = None
    """clamp_norm_factor: longest change of the layer's output, as a multiple of its norm."""
    kl: float | None = None
    """kl_factor."""
    stop: float | None = None
    """Loss (nats) under which a target counts as found."""
    contexts: int | None = None
    """Sampled sentences before the prompt, beside the bare prompt."""
    context_tokens: int = 10
    """Length of each, in tokens."""
    end: bool = True
    """The end token is part of the target, so that a free generation stops after the answer."""
    corpus: str | None = None
    """General text for second moments: a file, one text a line, or hub:DATASET[:CONFIG[:SPLIT[:FIELD]]]; else the train pool."""
    moments: Path | None = None
    """Folder where second moments are kept from one run to the next; by default that of --cache."""

    def problems(self) -> list[str]:
        least = {"steps": 1, "lr": 0, "decay": 0, "clamp": 0, "kl": 0, "stop": 0, "contexts": 0, "context_tokens": 1}
        values = {name: getattr(self, name) for name in least}
        out = [f"{n} must be {least[n]} or more, got {v}" for n, v in values.items() if v is not None and not v >= least[n]]
        layers = self.layers
        if layers is not None and (not layers or min(layers) < 0 or sorted(set(layers)) != list(layers)):
            out.append(f"layers must be one or more layers counted from 0, rising, got {', '.join(map(str, layers)) or 'none'}")
        return out


class LocateEditor(Editor):
    """Targets, one sweep of keys and residuals, a ridge solve a layer. Subclasses choose the prior and what else differs."""

    traits = Traits(weights=True, uses=frozenset({"train_pool"}))
    history = False
    """Past keys are constraints of every later solve."""
    bare_share = 0.5
    """Weight of the bare prompt's key beside the contexts' (MEMIT: half)."""

    def _prepare(self, pool: TrainPool) -> None:
        found, note = hyper_of(self.handle)
        self.hyper = self._tuned(overlaid(found, self.config))
        self.pool = pool
        self.notes += [note] if note and self.config.layers is None else []
        self.changes = Changes(self.handle, self._check_layers())
        self.moments: dict[int, Tensor] = {}
        self.priors: dict[int, Prior] = {}
        self.ridges: dict[int, Ridge] = {}
        self.contexts: list[str] = []

    def _tuned(self, hyper: Hyper) -> Hyper:
        """The hyper-parameters of this method; a wrapper may change them."""
        return hyper

    def _check_layers(self) -> list[int]:
        layers = sorted({n for stage in self._stages() for n in stage})
        last = self.handle.n_layers - 1
        if layers[-1] >= last:
            raise BadEditor(
                f"{self.name} cannot edit layer {layers[-1]} of {self.handle.name} (layers 0 to {last}): what is written at the "
                f"subject reaches the answer through attention above it, so the highest layer is {last - 1}"
            )
        return layers

    def _stages(self) -> list[tuple[int, ...]]:
        """Layers that share one target, found at the last of them; each stage starts from the weights the last one left."""
        return [self.hyper.layers]

    @abstractmethod
    def _prior(self, layer: int, moment: Tensor) -> Prior:
        """A0 of a layer, from its second moment C (f, f)."""

    def _share(self, left: int) -> float:
        """Part of the residual that a layer takes, with `left` layers to go, itself included."""
        return 1.0 / left

    def _unit(self, task: Task, heights: Tensor) -> Tensor:
        """(n,) norm that the clamp and the decay of a target are relative to."""
        return heights.norm(dim=1)

    def _search(self, task: Task, unit: Tensor) -> Found:
        """The target of each edit, as a change of the layer's output."""
        return search(task, self.hyper, unit)

    def _start(self, task: Task, heights: Tensor) -> Tensor:
        """(n, d) what the change of a target is added to."""
        return heights

    def _residual(self, sweep: Sweep, target: Tensor, keys: Tensor) -> Tensor:
        """(n, d) what is left to write at the stage's last layer."""
        return target - sweep.ahead()

    def _solve(self, layer: int, keys: Tensor, residual: Tensor, bare: Tensor) -> Solution:
        """The change of one layer, from averaged keys (n, f), the residual (n, d) it takes, and the bare prompts' keys (n, f)."""
        return self._ridge(layer).solve(keys, residual)

    def _keep(self, layer: int, step: int, solution: Solution, keys: Tensor | None) -> None:
        """Put a change into the state."""
        self.changes.add(layer, step, solution.left, solution.right, keys)

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        events = _newest(batch.events)
        log = Log(superseded=len(batch) - len(events), unnamed=sum(e.image is None and subject_of(e) is None for e in events))
        with stage("setup"):
            self._set_up(events[0])
        for group in self._groups(events):
            for layers in self._stages():
                with self.handle.swapped(self.changes.parameters()):
                    self._run_stage(layers, group, batch.step, log)
        return log.notes() | {"past_keys": float(max(map(len, self.changes.keys.values()), default=0))}

    def _groups(self, events: list[EditEvent]) -> list[list[EditEvent]]:
        """Edits that are made together; a later group meets the weights that an earlier one left."""
        return [events]

    def _set_up(self, event: EditEvent) -> None:
        """What the first edit needs: contexts, statistics, and a check that the layers have the form that is assumed."""
        if not self.contexts:
            self.contexts = ["", *draw_contexts(self.handle, self.hyper.contexts, self.config.context_tokens, self.generator(0))]
        if self.priors:
            return
        for layer in self.changes.layers:
            capture(self.handle, [ask_of(event)], [event.target], layer)
        corpus = corpus_of(self.pool, self.config.corpus)
        self.moments = second_moments(self.handle, corpus, self.changes.layers, self.config.moments)
        self.priors = {n: self._prior(n, c) for n, c in self.moments.items()}

    def _run_stage(self, layers: tuple[int, ...], events: Sequence[EditEvent], step: int, log: Log) -> None:
        task = Task(self.handle, events, layers[-1], self.contexts, self.config.end)
        with stage("targets"):
            before = heights(self.handle, events, layers[-1])
            found = self._search(task, self._unit(task, before))
            target = self._start(task, before) + found.delta
            log.targets(found)
        with stage("keys"):
            sweep = Sweep(self.handle, events, self.contexts, layers, self.bare_share)
        for i, layer in enumerate(layers):
            with stage("keys"), torch.no_grad():
                keys = sweep.read(layer)
                residual = self._residual(sweep, target, keys).to(keys.device) * self._share(len(layers) - i)
            with stage("solve"), torch.no_grad():
                old = self.changes.weight(layer)
                solution = self._solve(layer, keys, residual, sweep.bare_key)
                self._keep(layer, step, solution, keys if self.history else None)
                change = self.changes.weight(layer) - old
                self._ridge(layer).append(keys)
                sweep.add(lambda act, change=change: act.to(change.dtype) @ change.T)
            log.solved(solution, keys, change, self.priors[layer])

    def _ridge(self, layer: int) -> Ridge:
        """The layer's solver, with the remembered keys of a loaded state counted again."""
        if layer not in self.ridges:
            ridge = Ridge(self.priors[layer], self.history)
            for keys in self.changes.past(layer):
                ridge.append(keys)
            self.ridges[layer] = ridge
        return self.ridges[layer]

    def predictor(self) -> Predictor:
        weights = self.edited_weights()
        return ModelPredictor(self.handle, around=lambda batch: self.handle.swapped(weights))

    def edited_weights(self) -> dict[str, Tensor]:
        return self.changes.parameters()

    def _state(self) -> dict[str, Any]:
        return {"contexts": self.contexts, **self.changes.state()}

    def _load(self, state: dict[str, Any]) -> None:
        self.contexts = list(state["contexts"])
        self.changes.load(state)
        self.ridges = {}


def _newest(events: Sequence[EditEvent]) -> list[EditEvent]:
    """The events without those whose fact a later one of the same batch changes again."""
    last = {e.fact: e for e in events}
    return [e for e in events if last[e.fact] is e]


class Log:
    """Numbers of one batch for its report: what targets and solves say of themselves."""

    def __init__(self, **counts: float) -> None:
        self.values: dict[str, list[float]] = {}
        self.counts = {k: float(v) for k, v in counts.items()}

    def targets(self, found: Found) -> None:
        """Raises `EditFailed` for a target that is not finite."""
        if not torch.isfinite(found.delta).all():
            raise EditFailed("the search for a target went astray: its change is not finite")
        self._note(loss=found.loss.mean(), target_steps=found.steps.mean(), target_norm=found.delta.norm(dim=1).mean())
        self._note(already=(found.steps == 0).sum())

    def solved(self, solution: Solution, keys: Tensor, change: Tensor, prior: Prior) -> None:
        """Raises `EditFailed` for a change that is not finite."""
        norm = change.double().norm()
        if not torch.isfinite(norm):
            raise EditFailed("the solve went astray: the change of weights is not finite")
        self._note(change_norm=norm, novelty=solution.novelty, written=solution.written, condition=solution.condition)
        self._note(excluded=prior.excluded, collisions=collisions(keys))

    def _note(self, **values: Any) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(float(value))

    def notes(self) -> dict[str, float]:
        """Norms joined over layers, the worst condition and most collisions, the mean of everything else."""
        joined = {"change_norm": lambda v: sum(x * x for x in v) ** 0.5, "condition": max, "collisions": max, "excluded": max}
        means = {k: float(joined.get(k, lambda v: sum(v) / len(v))(v)) for k, v in self.values.items()}
        return means | self.counts


def collisions(keys: Tensor) -> int:
    """Pairs of keys (n, f) of a batch whose cosine is over 0.98: a linear map can hardly answer them differently."""
    unit = torch.nn.functional.normalize(keys.double(), dim=1)
    return int((torch.triu(unit @ unit.T, diagonal=1) > _SAME_KEY).sum())


def scale_of(hyper: Hyper, moment: Tensor) -> tuple[float, float, float]:
    """Units of lambda, L2 and the threshold: (key width, E|k|^2, mean eigenvalue of C) for derived values, else 1."""
    if not hyper.relative:
        return 1.0, 1.0, 1.0
    trace = float(moment.diagonal().sum())
    return float(len(moment)), trace, trace / len(moment)
