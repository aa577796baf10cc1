"""The core of all locate-then-edit methods (ROME, MEMIT, AlphaEdit, EMMET, PMET and the wrappers around them).

Each edit gets a target: what one layer should put out where the prompt's subject ends, so that the model gives
the new answer. Then every critical layer's down-projection takes its share of the way there by a ridge solve,
`Delta = R K^T (A0 + H + K K^T)^-1`. A method is a choice of prior A0, history H, share of the residual
and layers. The lookup position is the last token of the subject where the prompt names it, else the prompt's last token.

Of two edits of one fact in a batch the later one is made. Two edits of other facts with nearly the same key are
both made, at the mean where they conflict, and counted as `collisions`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import EditBatch, EditEvent, content_id
from testbed.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from testbed.core.timing import timed
from testbed.editors.base import BadEditor, EditFailed, EditorConfig, Traits, WeightEditor, require_same
from testbed.editors.hyperparameters import SHALLOW, Values
from testbed.editors.locate.general_text import corpus_of, corpus_problem
from testbed.editors.locate.keys import KeyComputation, ask_of, contexts_that_fit, draw_contexts, subject_of
from testbed.editors.locate.second_moments import second_moments
from testbed.editors.locate.solver import Prior, Ridge, Solution
from testbed.editors.locate.targets import Targets, TargetTask, notes_on_products, search, unchanged_outputs
from testbed.editors.locate.weight_changes import WeightDeltas
from testbed.model.handle import ModelHandle
from testbed.model.layout import adds_as_it_is
from testbed.model.suffix import suffix_from_down_projection

_SAME_KEY = 0.98
"""Cosine from which two keys of a batch count as colliding."""


@dataclass(frozen=True)
class TargetConfig(EditorConfig):
    """How a target is searched. Fields that are None come from the method's table by model."""

    steps: PositiveInt | None = None
    """v_num_grad_steps: evaluations of the target's loss (one fewer optimiser steps)."""
    lr: NonNegativeFloat | None = None
    """v_lr: Adam's step size of the target."""
    decay: NonNegativeFloat | None = None
    """v_weight_decay, on ||delta|| / ||h_0||^2."""
    clamp: NonNegativeFloat | None = None
    """clamp_norm_factor: longest delta, as a multiple of ||h_0||."""
    kl: NonNegativeFloat | None = None
    """kl_factor: weight of the KL divergence after "{subject} is a"."""
    stop: NonNegativeFloat | None = None
    """Loss (nats) under which a target counts as found."""
    contexts: NonNegativeInt | None = None
    """Sampled sentences before the prompt, beside the bare prompt."""
    context_tokens: tuple[PositiveInt, ...] | None = None
    """Their lengths in tokens, as many contexts of each."""
    end: bool = True
    """The end token is part of the target, so that a free generation stops after the answer."""
    products: Literal["float32", "bfloat16"] = "float32"
    """Numbers that a search multiplies with frozen weights on a CPU: float32, or bfloat16 (8 bits of precision), which is faster on
    processors with AVX-512 BF16 or AMX."""


@dataclass(frozen=True)
class LocateConfig(TargetConfig):
    """What every locate-then-edit method is tuned by; a method adds its own. Fields that are None come from its table by model."""

    layers: tuple[NonNegativeInt, ...] | None = None
    """Critical layers whose down-projections change, in rising order; the target is looked for at the last of them."""
    relative: bool | None = None
    """lambda is a multiple of the key width, L2 and the threshold are multiples of the mean eigenvalue of C."""
    corpus: str | None = None
    """General text for second moments: a file, one text a line, or hub:DATASET[:CONFIG[:SPLIT[:FIELD]]]; by default the stream's own
    running text, WikiText under the data root or in the hub's cache, or text that the model writes."""
    moments: Path | None = None
    """Folder where second moments are kept from one run to the next (by default that of --cache), or with published ones (.npz)."""

    def problems(self) -> list[str]:
        rising = self.layers is None or (bool(self.layers) and sorted(set(self.layers)) == list(self.layers))
        shown = ", ".join(map(str, self.layers or ())) or "none"
        corpus = corpus_problem(self.corpus) if self.corpus is not None else None
        return (
            super().problems()
            + ([corpus] if corpus else [])
            + ([] if rising else [f"layers must be one or more layers counted from 0, rising, got {shown}"])
        )


DEFAULTS: Values = {
    "steps": 25, "lr": 0.5, "decay": 0.5, "clamp": 0.75, "kl": 0.0625, "stop": 0.05, "contexts": 5, "context_tokens": (10,),
    "relative": False,
}  # fmt: skip
"""The values of the released MEMIT and AlphaEdit, where a model's row names no others."""


def derived_layers(depth: int) -> tuple[int, ...]:
    """Critical layers of a model without published ones: up to a quarter of the depth, of a shallow model the first.

    Raises `BadEditor` for a model of one layer, where nothing lies above the change.
    """
    if depth < 2:
        raise BadEditor("locate-then-edit methods need a decoder layer above the one they change; this model has a single layer")
    last = 0 if depth < SHALLOW else round(depth * 0.28)
    return tuple(range(max(0, last - 4, round(depth * 0.12)), last + 1)) if last else (0,)


def refuse_routed(editor: str, handle: ModelHandle, layers: Sequence[int]) -> None:
    """Raise `BadEditor` where the MLP of one of the layers is a mixture of routed experts alone."""
    for layer in layers:
        if handle.is_routed(layer):
            raise BadEditor(
                f"{editor} cannot edit layer {layer} of {handle.name}: its MLP is a mixture of routed experts without a shared one, so "
                "that no one matrix holds what is written for a subject. Use fine-tuning, a codebook or an adapter, which act on the "
                "attention's output projection there, or facts in the prompt"
            )


def middle(layers: tuple[int, ...]) -> int:
    """The layer that a method of a single layer edits among the critical ones."""
    return layers[len(layers) // 2]


class LocateEditor(WeightEditor):
    """Targets, one sweep of keys and residuals, a ridge solve a layer. Subclasses choose the prior and what else differs."""

    traits = Traits(weights=True, short_targets=True, uses=frozenset({"train_pool"}))
    history = False
    """Past keys are constraints of every later solve."""
    bare_share = 0.5
    """Weight of the bare prompt's key beside the contexts' (MEMIT: half)."""

    defaults: ClassVar[Values] = DEFAULTS
    relative: ClassVar[Values] = {}
    """The method's own weights for a model without published ones, relative to the model's keys."""
    shallow: ClassVar[Values] = {"steps": 30, "contexts": 0, "clamp": 10.0}
    """What differs on a model of few layers without published values, and on a deeper one (what most published rows agree on)."""
    deep: ClassVar[Values] = {"clamp": 4.0, "decay": 1e-3}
    needs_second_moments = True

    def _prepare(self, pool: TrainPool) -> None:
        self.pool = pool
        self.notes += notes_on_products(self.handle, self.config.products)
        self.deltas = WeightDeltas(self.handle, self._check_layers())
        for stage, written in zip(self._stages(), self._written_stages()):
            if written != stage:
                asked, why = ", ".join(map(str, stage)), "their MLP's output passes a norm, a factor or a gate before it is added"
                self.notes.append(f"of layers {asked} only {written[0]} is written: {why}, so that layers below cannot take a share")
        self.second_moments: dict[int, Tensor] = {}
        self.priors: dict[int, Prior] = {}
        self.ridges: dict[int, Ridge] = {}
        self.contexts: list[str] = []

    def _resolve(self) -> None:
        super()._resolve()
        own = [f"{k} {getattr(self.config, k):g}" for k in self.relative if getattr(self.config, k) is not None]
        if self.hyper.relative and self.config.relative is None and own:
            unit = f"{self.name}.relative=false takes it as it stands"
            self.notes.append(f"{', '.join(own)} is a multiple of the size of the model's keys; --set {unit}")

    def _derived(self) -> Values:
        """Values for a model nobody tuned: weights relative to its keys (unless `relative` is off), layers up to a quarter of the depth.

        The published lambda is 1 to 3 times the key width in GPT2-XL, GPT-J and Llama-3; here it is twice. Shallow
        models, the committed one among them, are edited in their first layer, without sampled contexts and with a
        wider clamp. Both were chosen on a development stream of the tiny model.
        """
        depth = self.handle.n_layers
        weights = {} if self.config.relative is False or not self.relative else {"relative": True, **self.relative}
        return {"layers": derived_layers(depth), **weights, **(self.shallow if depth < SHALLOW else self.deep)}

    def _check_layers(self) -> list[int]:
        layers = sorted({n for stage in self._stages() for n in stage})
        refuse_routed(self.name, self.handle, layers)
        layers = sorted({n for stage in self._written_stages() for n in stage})
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

    def _written_stages(self) -> list[tuple[int, ...]]:
        """The stages, each with its last layer alone where one of its layers does more to the MLP's output than add it.

        What such a layer adds is not linear in its weight (a norm keeps its length, for one), so that no share of a residual
        could be left to the layers below.
        """
        return [stage if all(adds_as_it_is(self.handle, n) for n in stage) else stage[-1:] for stage in self._stages()]

    @abstractmethod
    def _prior(self, layer: int, second_moment: Tensor) -> Prior:
        """A0 of a layer, from its second moment C (f, f)."""

    def _share(self, left: int) -> float:
        """Part of the residual that a layer takes, with `left` layers to go, itself included."""
        return 1.0 / left

    def _unit(self, task: TargetTask, outputs: Tensor) -> Tensor:
        """(n,) norm that the clamp and the decay of a target are relative to, from the layer's outputs (n, d)."""
        return outputs.norm(dim=1)

    def _search(self, task: TargetTask, unit: Tensor) -> Targets:
        """The target of each edit, as a change of the layer's output."""
        return search(task, self.hyper, unit)

    def _start(self, task: TargetTask, outputs: Tensor) -> Tensor:
        """(n, d) what the change of a target is added to, from the layer's outputs (n, d)."""
        return outputs

    def _residual(self, computation: KeyComputation, target: Tensor, keys: Tensor) -> Tensor:
        """(n, d) what is left to write at the stage's last layer."""
        return target - computation.last_output()

    def _solve(self, layer: int, keys: Tensor, residual: Tensor, bare: Tensor) -> Solution:
        """The change of one layer, from averaged keys (n, f), the residual (n, d) it takes, and the bare prompts' keys (n, f)."""
        return self._ridge(layer).solve(keys, residual)

    def _keep(self, layer: int, step: int, solution: Solution, keys: Tensor | None) -> None:
        """Put a change into the state; the ridge counts its keys already."""
        self.deltas.add(layer, step, solution.left, solution.right, keys)

    def _edit(self, batch: EditBatch) -> dict[str, float]:
        events = _newest(batch.events)
        log = BatchLog(superseded=len(batch) - len(events), unnamed=sum(e.image is None and subject_of(e) is None for e in events))
        with timed("setup"):
            self._set_up(events[0])
        for group in self._groups(events):
            for layers in self._written_stages():
                with self.handle.swapped(self.deltas.parameters()):
                    self._run_stage(layers, group, batch.step, log)
        return log.notes() | {"past_keys": float(max(map(len, self.deltas.keys.values()), default=0))}

    def _groups(self, events: list[EditEvent]) -> list[list[EditEvent]]:
        """Edits that are made together; a later group meets the weights that an earlier one left."""
        return [events]

    def _set_up(self, event: EditEvent) -> None:
        """What the first edit needs: contexts, statistics, and a check that the layers have the form that is assumed."""
        if not self.contexts:
            self.contexts = ["", *draw_contexts(self.handle, self.hyper.contexts, self.hyper.context_tokens, self.generator(0))]
        if self.priors:
            return
        for layer in self.deltas.layers:
            suffix_from_down_projection(self.handle, [ask_of(event)], [event.target], layer)
        if self.needs_second_moments:
            corpus = corpus_of(self.handle, self.pool, self.config.corpus)
            self.second_moments = second_moments(self.handle, corpus, self.deltas.layers, self.config.moments, self.notes)
        self.priors = {n: self._prior(n, self.second_moments.get(n, torch.zeros(0))) for n in self.deltas.layers}

    def _run_stage(self, layers: tuple[int, ...], events: Sequence[EditEvent], step: int, log: BatchLog) -> None:
        contexts = contexts_that_fit(self.handle, events, self.contexts, self.notes, self.config.end)
        task = TargetTask(self.handle, events, layers[-1], contexts, self.config.end)
        facts = [content_id(*e.fact) for e in events]
        with timed("targets"):
            before = unchanged_outputs(self.handle, events, layers[-1])
            found = self._search(task, self._unit(task, before))
            target = self._start(task, before) + found.delta
            log.targets(found)
        with timed("keys"):
            computation = KeyComputation(self.handle, events, contexts, layers, self.bare_share)
        for i, layer in enumerate(layers):
            with timed("keys"), torch.no_grad():
                keys = computation.keys(layer)
                residual = self._residual(computation, target, keys).to(keys.device) * self._share(len(layers) - i)
            with timed("solve"), torch.no_grad():
                old = self.deltas.weight(layer)
                self._forget_changed(layer, facts)
                solution = self._solve(layer, keys, residual, computation.bare_key)
                self._ridge(layer).append(keys)
                self._keep(layer, step, solution, keys if self.history else None)
                if self.history:
                    self.deltas.name_keys(layer, facts)
                change = self.deltas.weight(layer) - old
                if layer != layers[-1]:
                    computation.add(lambda act, change=change: act.to(change.dtype) @ change.T)
            log.solved(solution, keys, change, self._ridge(layer).prior)

    def _ridge(self, layer: int) -> Ridge:
        """The layer's solver, with the remembered keys of a loaded state counted again."""
        if layer not in self.ridges:
            self.ridges[layer] = self._ridge_over(layer, self.deltas.past(layer))
        return self.ridges[layer]

    def _ridge_over(self, layer: int, past: Sequence[Tensor]) -> Ridge:
        ridge = self._new_ridge(layer)
        for keys in past:
            ridge.append(keys)
        return ridge

    def _forget_changed(self, layer: int, facts: Sequence[str]) -> None:
        """Let the old key of a fact that changes again constrain nothing: as a constraint it would keep half of the old answer."""
        if self.deltas.knows(layer, facts):
            self.ridges[layer] = self._ridge_over(layer, self.deltas.past(layer, facts))

    def _new_ridge(self, layer: int) -> Ridge:
        """A layer's solver that counts no key yet."""
        return Ridge(self.priors[layer], self.history)

    def edited_weights(self) -> dict[str, Tensor]:
        return self.deltas.parameters()

    def _state(self) -> dict[str, Any]:
        return {"contexts": self.contexts, "model": self.handle.hash, **self.deltas.state()}

    def _load(self, state: dict[str, Any]) -> None:
        if "model" in state:  # a state of an older version does not say whose keys it holds
            require_same(state, {"model": self.handle.hash})
        self.contexts = list(state["contexts"])
        self.deltas.load(state)
        self.ridges = {}


def _newest(events: Sequence[EditEvent]) -> list[EditEvent]:
    """The events without those whose fact a later one of the same batch changes again."""
    last = {e.fact: e for e in events}
    return [e for e in events if last[e.fact] is e]


class BatchLog:
    """Numbers of one batch for its report: what targets and solves say of themselves."""

    def __init__(self, **counts: float) -> None:
        self.values: dict[str, list[float]] = {}
        self.counts = {k: float(v) for k, v in counts.items()}

    def targets(self, found: Targets) -> None:
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


def scale_of(hyper: Any, second_moment: Tensor) -> tuple[float, float, float]:
    """Units of lambda, L2 and the threshold: (key width, E|k|^2, mean eigenvalue of C) for derived values, else 1."""
    if not hyper.relative:
        return 1.0, 1.0, 1.0
    trace = float(second_moment.diagonal().sum())
    return float(len(second_moment)), trace, trace / len(second_moment)
