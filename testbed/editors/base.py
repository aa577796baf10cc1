# pyright: strict
"""The contract of an editor, and what every editor shares: limits, failures that leave no trace, undo.

A method is one file with a `Config` dataclass (the paper's symbol and default beside each field), its `Traits`,
and the methods `_prepare`, `_edit`, `predictor`, `_state` and `_load`. A method that changes weights of the model
is a `WeightEditor` and gives `edited_weights` instead of `predictor`. Tensors in a state are replaced and never
changed in place, so that a shallow copy is a snapshot from which a failed edit is undone. A batch that fails is
made again in halves, so that one bad edit does not take the others with it.

A `Wrapper` changes part of another method and is named behind it with a plus (`alphaedit+blue`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import EditBatch, EditEvent, hide_previous
from testbed.core.ranges import out_of_range
from testbed.core.schema import EditReport
from testbed.core.timing import NOTE_PREFIX, collect_seconds
from testbed.editors.hyperparameters import PLAIN, Table, Values, doubts, model_key, resolve
from testbed.editors.reports import joined, of_events
from testbed.editors.traits import Traits
from testbed.editors.work import Work, derived_work
from testbed.model import out_of_memory as memory
from testbed.model.encoding import PromptTooLong, UntokenizableAnswer
from testbed.model.handle import BadModel, ModelHandle
from testbed.model.predictor import ModelPredictor, Predictor

_FIRST = 4
"""Edits after which an editor is looked at."""


class EditFailed(RuntimeError):
    """An edit or a batch could not be made (its loss is not finite, ...). It is recorded and changes nothing; the stream goes on."""


FAILURES: tuple[type[BaseException], ...] = (EditFailed, UntokenizableAnswer, PromptTooLong, torch.linalg.LinAlgError)  # pyright: ignore
"""Errors that fail an edit and let the stream go on, beside those that say that memory ran out."""


class BadEditor(ValueError):
    """A configuration or a state does not fit. The message says what was expected, what was found, and what to do."""


@dataclass(frozen=True)
class EditorConfig:
    """Base of every editor's configuration. A range is written beside a field's type (`testbed.core.ranges`)."""

    def problems(self) -> list[str]:
        """One sentence for each mistake in the values; a method adds checks that concern several fields."""
        return out_of_range(self)


class Editor(ABC):
    """One sequential editor, registered with `EDITORS.register(name)` and found by a scan of the package."""

    name: ClassVar[str]
    summary: ClassVar[str]
    traits: ClassVar[Traits]
    Config: ClassVar[type[EditorConfig]]
    published: ClassVar[Table] = {}
    """The method's published values by model, in its own file."""
    defaults: ClassVar[Values] = {}
    """Values of fields that are None in the configuration, where neither a published row nor a derived value says otherwise."""

    waits = False
    """Edits were taken in whose training is yet to come."""
    handle: ModelHandle
    hyper: Any
    """The configuration with its None fields filled in for the model (`testbed.editors.hyperparameters`)."""

    def __init__(self, config: Any = None, seed: int = 0) -> None:
        self.config: Any = config if config is not None else self.Config()
        self.seed = seed
        self.notes: list[str] = []
        self._first: list[EditEvent] | None = []
        """The first edits until there are enough to look at; None after that, and in a run that goes on."""
        self._revises: dict[str, str | None] = {}
        self.step = 0
        """Step of the newest batch."""
        self.max_batch_found: int | None = None
        """The most edits at once that memory was found to hold; None as long as it never ran out."""

    def prepare(self, handle: ModelHandle, pool: TrainPool) -> None:
        """Bind the editor to a model, once, before the first edit. It sees an empty pool unless its Traits declare its use."""
        self._plain = pool.texts[:8] or PLAIN
        self.bind(handle)
        seen = pool if "train_pool" in self.traits.uses else TrainPool()
        self._prepare(replace(seen, find_edits=(lambda: pool.edits) if "train_edits" in self.traits.uses else tuple))

    def bind(self, handle: ModelHandle) -> None:
        """Take a model and the hyper-parameters for it, which is all that `work` needs."""
        self.handle = handle
        self._resolve()

    def work(self, batch: int) -> Work:
        """What the editor will have the model do, with so many edits in a batch. It is asked after `bind`, without `prepare`.

        Derived from the hyper-parameters; a method overrides it where they do not tell.
        """
        return derived_work(self.handle, self.hyper, self.traits)

    def _resolve(self) -> None:
        """Fill in `hyper` for the model, and say where its values come from."""
        key = model_key(self.handle)
        self.hyper, source = resolve(self._tuned(self.config), key, self.published, self._derived(), self.defaults)
        if self.traits.learns == "training":
            self.notes.append(source + ("" if key in self.published else f"; choose better ones with {self._tune}"))

    @property
    def _tune(self) -> str:
        return f"python -m testbed.tune --model {self.handle.name} --editor {self.name}"

    def _derived(self) -> Values:
        """Values for a model without a published row."""
        return {}

    def _tuned(self, config: Any) -> Any:
        """The configuration before the model's row fills it in; a wrapper may fill in its own values first."""
        return config

    def apply(self, batch: EditBatch) -> EditReport:
        """Make the edits of one step; an empty batch is the identity.

        An edit that fails is reported and changes nothing. A batch that fails is made again in two halves, and a half
        that fails likewise, until each edit at fault stands alone and the others are made. The same is done with a
        batch that memory cannot hold, and later batches are then made in parts of a size that fitted. A retire takes
        the fact's edits out where the method has undo; else it is skipped and counted. Raises `BadEditor` for a batch
        over `Traits.max_batch`.
        """
        limit = self.traits.max_batch
        if limit is not None and len(batch) > limit:
            raise BadEditor(f"{self.name} takes at most {limit} edits at once, got {len(batch)}: use --batch {limit}")
        report = EditReport(step=batch.step, event_ids=tuple(e.id for e in batch.events))
        if not batch.events:
            return report
        self.step = batch.step
        report = joined(report, self._in_parts(batch))
        if batch.closes_year and self.waits:
            report = replace(report, notes={**report.notes, **self._end_year()})
        self._look_at_first(batch.events)
        return replace(report, delta_norm=self.delta_norm(), state_bytes=self.state_bytes())

    def _end_year(self) -> dict[str, float]:
        """Learn what waits, or let all of it wait on and say why; notes for the report."""
        before = self.state_dict()
        try:
            with collect_seconds() as seconds:
                notes = self._close_year(self.step)
        except (RuntimeError, MemoryError, BadModel) as e:
            if not (isinstance(e, FAILURES) or memory.is_out_of_memory(e)):
                raise
            self.notes.append(f"the edits that waited until step {self.step} could not be learned and wait on: {e}")
            memory.free()
            self.load_state_dict(before)
            return {"year_failed": 1.0}
        return notes | {NOTE_PREFIX + k: v for k, v in seconds.items()}

    def _look_at_first(self, events: Sequence[EditEvent]) -> None:
        """Say once, when a few edits are made, whether they change nothing or wreck the model."""
        if self._first is None or self.traits.learns == "no":
            return
        newest = {e.fact: e for e in (*self._first, *events) if e.kind != "retire" and e.id in self._revises}
        self._first = [*newest.values()]
        if len(self._first) >= _FIRST and not self.waits:
            found = doubts(self.handle, self.predictor(), self._first, self._plain, self.traits.told_truth)
            self.notes += [f"{doubt}; choose other values with {self._tune}" for doubt in found]
            self._first = None

    def _in_parts(self, batch: EditBatch) -> list[EditReport]:
        """A report for each part that was made or failed as one: the whole batch where nothing fails."""
        if self.max_batch_found is None or len(batch) <= self.max_batch_found:
            report = self._at_once(batch)
            if not report.failed or len(batch) == 1:
                return [report]
        half = len(batch) // 2
        both = (batch.events[:half], batch.events[half:])
        return [part for events in both for part in self._in_parts(EditBatch(events, batch.step, of_events(events, batch.paraphrases)))]

    def _at_once(self, batch: EditBatch) -> EditReport:
        """Make all edits together, or none of them and say why."""
        report = EditReport(step=batch.step, event_ids=tuple(e.id for e in batch.events))
        before = self.state_dict()
        retire = [e for e in batch.events if e.kind == "retire"]
        edits = EditBatch(self._allowed(batch.events), batch.step, self._paraphrases(batch))
        try:
            with collect_seconds() as seconds:
                notes = self._edit(edits) if edits.events else {}
            skipped = self._retire(retire)
        except (RuntimeError, MemoryError, BadModel) as e:
            if not (isinstance(e, FAILURES) or memory.is_out_of_memory(e)):
                raise
            reason = self._out_of_memory(len(batch)) if memory.is_out_of_memory(e) else str(e)
        else:
            made = {e.id: e.revises for e in batch.events if e.kind != "retire"}
            self._revises = {**self._revises, **made}
            notes = notes | {NOTE_PREFIX + k: v for k, v in seconds.items()}
            return replace(report, notes=notes, skipped=skipped)
        memory.free()
        self.load_state_dict(before)
        return replace(report, failed={e.id: reason for e in batch.events})

    def _out_of_memory(self, n: int) -> str:
        """Remember that memory ran out with n edits at once, and return the reason to report."""
        if n > 1:
            self.max_batch_found = n // 2
            self.notes.append(f"memory ran out with {n} edits at once at step {self.step}: from there on at most {n // 2} are made at once")
        return "memory ran out"

    def _allowed(self, events: Iterable[EditEvent]) -> tuple[EditEvent, ...]:
        keep = [e for e in events if e.kind != "retire"]
        return tuple(keep if "previous" in self.traits.uses else map(hide_previous, keep))

    def _paraphrases(self, batch: EditBatch) -> dict[str, tuple[str, ...]]:
        return dict(batch.paraphrases) if "paraphrase" in self.traits.uses else {}

    def _retire(self, events: list[EditEvent]) -> dict[str, str]:
        if not self.traits.undo:
            return {e.id: "retire: this method has no undo" for e in events}
        for e in events:
            gone = self._lineage(e.revises)
            self.revert(gone)
            self._revises = {k: v for k, v in self._revises.items() if k not in gone}
        return {}

    def _lineage(self, event_id: str | None) -> list[str]:
        """The edits of one fact back to its first, newest first."""
        out: list[str] = []
        while event_id is not None and event_id in self._revises:
            out.append(event_id)
            event_id = self._revises[event_id]
        return out

    @abstractmethod
    def _prepare(self, pool: TrainPool) -> None:
        """Build the state before the first edit, for the model in `self.handle`."""

    @abstractmethod
    def _edit(self, batch: EditBatch) -> dict[str, float]:
        """Make the edits and return notes for the report, by name. Raises `EditFailed`."""

    def _close_year(self, step: int) -> dict[str, float]:
        """Learn what waits, behind the last edit of a year, and return notes for the report. Raises `EditFailed`."""
        return {}

    @abstractmethod
    def predictor(self) -> Predictor:
        """The edited model, as probes see it."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """Tensors and JSON values by name. Together with the configuration they are the whole state."""

    @abstractmethod
    def _load(self, state: dict[str, Any]) -> None:
        """Take over what `_state` returned. Raises `BadEditor` for a state of another shape or model."""

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and JSON values by name. It is a shallow copy, because no tensor in it is ever changed in place."""
        return {**self._state(), "revises": dict(self._revises)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` returned. Raises `BadEditor` for a state of another shape or model."""
        state = dict(state)
        self._revises = dict(state.pop("revises", {}))
        self._first = None if self._revises and not self.step else self._first
        self._load(state)

    def revert(self, event_ids: Iterable[str]) -> None:
        """Undo these edits. Raises `BadEditor` where the method cannot, or for an unknown id."""
        raise BadEditor(f"{self.name} has no undo; edit the old value back instead")

    def edited_weights(self) -> dict[str, Tensor]:
        """Changed parameters by name, for --save-model; empty unless `Traits.weights`."""
        return {}

    def delta_norm(self) -> float | None:
        """Frobenius norm of the changes of all weights together; None where the method changes none."""
        changed = self.edited_weights()
        if not changed:
            return None
        squares = [(w.double() - self.handle.parameter(n).double()).square().sum() for n, w in changed.items()]
        return sum(map(float, squares)) ** 0.5

    def state_bytes(self) -> int:
        """Bytes of the tensors in the state."""
        return sum(t.numel() * t.element_size() for t in self._state().values() if isinstance(t, Tensor))

    def generator(self, step: int) -> torch.Generator:
        """The random numbers of one step. They depend on (seed, step) alone, so that a resumed run draws the same."""
        entropy = np.random.SeedSequence([self.seed, step]).generate_state(2, dtype=np.uint32)
        return torch.Generator().manual_seed(int(entropy[0]) << 32 | int(entropy[1]))


class WeightEditor(Editor):
    """An editor that answers with changed weights of the model: it gives them, and the predictor puts them in place of the model's own."""

    traits = Traits(weights=True)

    @abstractmethod
    def edited_weights(self) -> dict[str, Tensor]:
        """Changed parameters by name, each in the shape in which the model stores it and in at least float32."""

    def predictor(self) -> Predictor:
        """The model under the weights as they are now; later edits do not change this predictor."""
        return ModelPredictor(self.handle, weights=self.edited_weights())


class Wrapper:
    """A method that changes part of another (its host). Registered with `WRAPPERS.register(name)`.

    It overrides steps of its host and calls `super()` for the rest: `alphaedit+blue` is the class with both as
    bases, and its configuration has the fields of both.
    """

    summary: ClassVar[str]
    Config: ClassVar[Any]
    hosts: ClassVar[type[Editor]] = Editor
    """The base class of the editors that it can wrap."""
    former: ClassVar[str | None] = None
    """The wrapper that had this name before; stored runs whose configuration lacks fields of this one go on as that."""

    @classmethod
    def over(cls, host: type[Editor], name: str) -> type[Editor]:
        """The class of the host inside this wrapper. Raises TypeError for a host of another kind."""
        if not issubclass(host, cls.hosts):
            raise TypeError(f"it wraps editors of the kind {cls.hosts.__name__}, and {host.name} is none")
        config = dataclass(frozen=True)(type(f"{cls.Config.__name__}Over{host.Config.__name__}", (cls.Config, host.Config), {}))
        body = {"name": name, "summary": f"{host.summary}; {cls.summary}", "Config": config, "__doc__": cls.__doc__}
        return type(cls.__name__ + host.__name__, (cls, host), body)


def require_finite_loss(loss: Tensor, lr: float) -> None:
    """Raise `EditFailed` where a loss, of any shape, is not finite."""
    if not torch.isfinite(loss).all():
        raise EditFailed(f"the loss became {loss.tolist()} at lr {lr}; try a smaller one")  # pyright: ignore[reportUnknownMemberType]


def minimise(
    tensors: Sequence[Tensor],
    losses: Callable[[], Tensor],
    lr: float,
    steps: int,
    after_step: Callable[[], object] | None = None,
) -> Tensor:
    """Take steps of a new Adam on the sum of losses, and return the losses before the last step.

    The leaf tensors are changed in place. Raises `EditFailed` where a loss is not finite.
    """
    adam, last = torch.optim.Adam(tensors, lr=lr, fused=True), torch.full((), torch.nan)
    for _ in range(steps):
        adam.zero_grad()
        last = losses()
        require_finite_loss(last, lr)
        last.sum().backward()  # pyright: ignore[reportUnknownMemberType]
        with torch.no_grad():
            adam.step()  # pyright: ignore[reportUnknownMemberType]
            if after_step is not None:
                after_step()
    return last.detach()


def require_same(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise `BadEditor` where a value in a state differs from the one of the same name that this editor has."""
    for name, value in own.items():
        if state.get(name) != value:
            raise BadEditor(f"the state was made with {name} {state.get(name)}, this editor has {value}")


def need(state: dict[str, Any], name: str, shape: tuple[int | None, ...]) -> Tensor:
    """The tensor of this name from a state. Raises `BadEditor` unless it has the shape (None matches any size)."""
    t: Any = state.get(name)
    if not isinstance(t, Tensor):
        raise BadEditor(f"the state has no tensor {name!r}; it holds {', '.join(map(repr, state)) or 'nothing'}")
    if t.ndim != len(shape) or any(want is not None and want != got for want, got in zip(shape, t.shape)):
        raise BadEditor(f"{name!r} has shape {tuple(t.shape)}, expected {shape}: the state belongs to another model, layer or config")
    return t


def appended(buffer: Tensor, at: int, new: Tensor) -> Tensor:
    """A buffer that holds `new` from row `at` on: the same one where it is long enough, else one with a quarter of its rows to spare.

    Rows before `at` stay as they are, so that views of them never change.
    """
    if at + len(new) > len(buffer):
        larger = buffer.new_zeros(max(16, int(1.25 * at), at + len(new)), *buffer.shape[1:])
        larger[:at] = buffer[:at]
        buffer = larger
    buffer[at : at + len(new)] = new
    return buffer
