"""The contract of an editor, and what every editor shares: limits, failures that leave no trace, undo.

A method is one file: a `Config` dataclass (the paper's symbol and default beside each field), its `Traits`,
and four verbs: `_prepare`, `_edit`, `predictor`, the state. Tensors in a state are replaced, never changed
in place, so a snapshot is a shallow copy and a failed edit is undone by putting it back. A batch that fails
is made in halves, so that one bad edit costs itself alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from streams.base import TrainPool
from testbed.core.events import EditBatch, EditEvent, hide_previous
from testbed.core.ranges import out_of_range
from testbed.core.schema import EditReport
from testbed.core.timing import NOTE_PREFIX, collect_seconds
from testbed.model import out_of_memory as memory
from testbed.model.encoding import UntokenizableAnswer
from testbed.model.handle import ModelHandle
from testbed.model.predictor import Predictor

Sample = Literal["paraphrase", "previous", "train_pool"]


class EditFailed(RuntimeError):
    """One edit or batch that could not be made (non-finite loss, ...): recorded, nothing changed, the stream goes on."""


class BadEditor(ValueError):
    """A configuration or a state that does not fit: expected, found, what to do."""


@dataclass(frozen=True)
class Traits:
    """What an editor is and may see. The loop and the tests ask these, never its name."""

    weights: bool = False
    """It answers with changed weights of the model itself (so the edited model can be saved)."""
    gated: bool = False
    """It decides for each prompt whether to act; a miss returns the base's own tensors."""
    undo: bool = False
    """`revert(event_ids)` restores the state before these edits."""
    told_truth: bool = False
    """Its predictor is told the right answer (the oracle alone)."""
    max_batch: int | None = None
    """Largest batch of edits it takes at once."""
    uses: frozenset[Sample] = frozenset()
    """Extra samples that the published method uses; it gets these and no others."""


@dataclass(frozen=True)
class EditorConfig:
    """Base of every editor's configuration. A range is written beside a field's type (`testbed.core.ranges`)."""

    def problems(self) -> list[str]:
        """Every mistake in the values, as sentences; a method adds what ranges cannot say."""
        return out_of_range(self)


class Editor(ABC):
    """One sequential editor. Registered with `EDITORS.register(name)`; found by scan."""

    name: ClassVar[str]
    summary: ClassVar[str]
    traits: ClassVar[Traits]
    Config: ClassVar[type[EditorConfig]]

    handle: ModelHandle

    def __init__(self, config: Any = None, seed: int = 0) -> None:
        self.config: Any = config if config is not None else self.Config()
        self.seed = seed
        self.notes: list[str] = []
        self._revises: dict[str, str | None] = {}
        self.step = 0
        """Step of the newest batch."""
        self.room: int | None = None
        """Most edits that memory was found to have room for at once; None as long as it never ran out."""

    def prepare(self, handle: ModelHandle, pool: TrainPool) -> None:
        """Bind to a model, once, before the first edit; `pool` is empty unless the Traits declare its use."""
        self.handle = handle
        self._prepare(pool if "train_pool" in self.traits.uses else TrainPool())

    def apply(self, batch: EditBatch) -> EditReport:
        """Make the edits of one step; an empty batch is the identity.

        An edit that fails is reported and changes nothing. A batch that fails is made in two halves, each of these
        likewise, until the edits at fault stand alone: the others are made. So is a batch that memory has no room
        for, and later batches are then made in parts of a size that fitted. A retire is undone where the method has
        undo, else skipped and counted. Raises `BadEditor` for a batch over `Traits.max_batch`.
        """
        limit = self.traits.max_batch
        if limit is not None and len(batch) > limit:
            raise BadEditor(f"{self.name} takes at most {limit} edits at once, got {len(batch)}: use --batch {limit}")
        report = EditReport(step=batch.step, event_ids=tuple(e.id for e in batch.events))
        if not batch.events:
            return report
        self.step = batch.step
        parts = self._in_parts(batch)
        return replace(_joined(report, parts), delta_norm=self.delta_norm(), state_bytes=self.state_bytes())

    def _in_parts(self, batch: EditBatch) -> list[EditReport]:
        """A report for each part that was made or failed as one: the whole batch where nothing fails."""
        if self.room is None or len(batch) <= self.room:
            report = self._at_once(batch)
            if not report.failed or len(batch) == 1:
                return [report]
        half = len(batch) // 2
        both = (batch.events[:half], batch.events[half:])
        return [part for events in both for part in self._in_parts(EditBatch(events, batch.step, _of(events, batch.paraphrases)))]

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
        except (RuntimeError, MemoryError, UntokenizableAnswer) as e:
            if not (isinstance(e, (EditFailed, UntokenizableAnswer, torch.linalg.LinAlgError)) or memory.is_out_of_memory(e)):
                raise
            reason = self._no_room(len(batch)) if memory.is_out_of_memory(e) else str(e)
        else:
            made = {e.id: e.revises for e in batch.events if e.kind != "retire"}
            self._revises = {**self._revises, **made}
            notes = notes | {NOTE_PREFIX + k: v for k, v in seconds.items()}
            return replace(report, notes=notes, skipped=skipped)
        memory.free()
        self.load_state_dict(before)
        return replace(report, failed={e.id: reason for e in batch.events})

    def _no_room(self, n: int) -> str:
        """Remember that memory ran out with n edits at once; the reason to report."""
        if n > 1:
            self.room = n // 2
            self.notes.append(
                f"memory ran out with {n} edits at once at step {self.step}: from there on at most {self.room} are made at once"
            )
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
        """Make the empty state for `self.handle`."""

    @abstractmethod
    def _edit(self, batch: EditBatch) -> dict[str, float]:
        """Make the edits; returns notes for the report. Raises `EditFailed`."""

    @abstractmethod
    def predictor(self) -> Predictor:
        """The edited model, as probes see it."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """Tensors and JSON values by name; together with the config they are the whole state."""

    @abstractmethod
    def _load(self, state: dict[str, Any]) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors and JSON values, shallow: what is in it is never changed in place."""
        return {**self._state(), "revises": dict(self._revises)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The reverse. Raises `BadEditor` for a state of another shape or model."""
        state = dict(state)
        self._revises = dict(state.pop("revises", {}))
        self._load(state)

    def revert(self, event_ids: Iterable[str]) -> None:
        """Undo these edits. Raises `BadEditor` where the method cannot, or for an unknown id."""
        raise BadEditor(f"{self.name} has no undo; edit the old value back instead")

    def edited_weights(self) -> dict[str, torch.Tensor]:
        """Changed parameters by name, for --save-model; empty unless `Traits.weights`."""
        return {}

    def delta_norm(self) -> float | None:
        """Frobenius norm of all changes of weights together; None where none change."""
        changed = self.edited_weights()
        if not changed:
            return None
        squares = [(w.double() - self.handle.parameter(n).double()).square().sum() for n, w in changed.items()]
        return sum(map(float, squares)) ** 0.5

    def state_bytes(self) -> int:
        """Bytes of the tensors in the state."""
        return sum(t.numel() * t.element_size() for t in self._state().values() if isinstance(t, torch.Tensor))

    def generator(self, step: int) -> torch.Generator:
        """Randomness of one step: a function of (seed, step), so a resumed run draws the same."""
        entropy = np.random.SeedSequence([self.seed, step]).generate_state(2, dtype=np.uint32)
        return torch.Generator().manual_seed(int(entropy[0]) << 32 | int(entropy[1]))


def _of(events: Sequence[EditEvent], by_id: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a mapping by event id that belongs to these events."""
    return {e.id: by_id[e.id] for e in events if e.id in by_id}


def _joined(report: EditReport, parts: Sequence[EditReport]) -> EditReport:
    """One report of a batch's parts. Of several, numbers are those of the last that was made, seconds added up."""
    made = [p for p in parts if not p.failed]
    notes = dict(made[-1].notes) if made else {}
    notes |= {k: sum(p.notes.get(k, 0.0) for p in made) for k in notes if k.startswith(NOTE_PREFIX)}
    notes |= {"parts": float(len(parts))} if len(parts) > 1 else {}
    failed = {i: reason for p in parts for i, reason in p.failed.items()}
    return replace(report, notes=notes, failed=failed, skipped={i: reason for p in parts for i, reason in p.skipped.items()})


def need(state: dict[str, Any], name: str, shape: tuple[int | None, ...]) -> torch.Tensor:
    """The tensor of this name from a state. Raises `BadEditor` unless it has the shape (None matches any size)."""
    t: Any = state.get(name)
    if not isinstance(t, torch.Tensor):
        raise BadEditor(f"the state has no tensor {name!r}; it holds {', '.join(map(repr, state)) or 'nothing'}")
    if t.ndim != len(shape) or any(want is not None and want != got for want, got in zip(shape, t.shape)):
        raise BadEditor(f"{name!r} has shape {tuple(t.shape)}, expected {shape}: the state belongs to another model, layer or config")
    return t
