"""The stored rows: field names, types, units, schema version. Nothing here is an average.

Files of a run folder OUT (see docs/layout.md): `manifest.json`, `schedule.parquet`, `events.parquet`,
`questions.parquet`, `base/answers.parquet`, `EDITOR/records/step-*.parquet`, `EDITOR/monitors/step-*.parquet`,
`EDITOR/edits.jsonl`.
"""

from __future__ import annotations

import re
import types
import typing
from dataclasses import dataclass, field, fields
from typing import Any

SCHEMA_VERSION = 2
"""Raised when a field or a file is added, removed or changes its meaning."""
READABLE_VERSIONS = (1, 2)
"""Versions that analysis still reads. A run goes on under its own version alone. 1 has no monitors and no choices."""


@dataclass(frozen=True, slots=True)
class Record:
    """One answer of one editor at one moment. Absent (None) means not measured, never zero."""

    run: str
    """Run id (hash of the manifest's configuration)."""
    editor: str
    """Name of the editor, wrappers included ("alphaedit+blue")."""
    seed: int
    """Seed of the run."""
    edit_id: str | None
    """The edit the question is about; absent for general questions."""
    edit_step: int | None
    """Step at which that edit was applied (1-based)."""
    edit_time: float | None
    """Time of that edit, in years of the stream."""
    probe_step: int
    """Steps applied when the question was asked; 0 is the unedited model."""
    probe_time: float
    """Time of the last applied edit, in years of the stream."""
    probe: str
    """Name of the probe that asked."""
    probe_version: int
    """Version of that probe."""
    split: str
    """One of `testbed.core.events.SPLITS`."""
    topic: str
    """Ability or category of a general question; else the edit's relation; may be empty."""
    question_id: str
    """Key into questions.parquet."""
    answer: str | None
    """What the answer is judged by: the gold answer, or for locality splits the unedited model's own answer."""
    target: str | None
    """The target of the edit, where the question belongs to one."""
    base_answer: str
    """What the unedited model generated for this question."""
    token_hits: int | None
    """Answer tokens that are the argmax under teacher forcing; absent where no answer could be scored."""
    n_tokens: int | None
    """Number of answer tokens scored."""
    logprob: float | None
    """Sum of log-probabilities (nats) of the answer's tokens under teacher forcing."""
    generated: str | None
    """Free greedy generation with natural stop; absent for running text."""
    exact: bool | None
    """Generated text equals the answer or an alias after normalisation (`testbed.core.grading`)."""
    panel: str
    """Name of the panel the question was drawn for."""
    incl_prob: float
    """Probability with which the panel included this question, in (0, 1]."""
    seconds: float
    """Wall time of the question's share of its batch."""
    extras: str
    """JSON object with what an editor or a monitor adds (entry hit, retrieved facts, ...); of locality questions also
    `first_ids`, the ids of the ten likeliest first tokens in order; of choices `choices`, the log-probability (nats) of
    each (null where not finite), and `chosen`, the number of the one taken; of refusals `refused`, and for harmful
    requests `sha256` of what was said, in the place of the text."""


@dataclass(frozen=True, slots=True)
class MonitorRow:
    """One number about the inside of an edited model after a step (`testbed.monitors`). What has no value has no row."""

    step: int
    name: str
    """What was measured: weight_norm, hidden_cosine, entropy, ..."""
    value: float


@dataclass(frozen=True, slots=True)
class BaseAnswer:
    """The unedited model on one question: asked once, shared by all editors of the run."""

    question_id: str
    answer: str | None
    """What was scored: the gold answer, or for locality splits the generated text itself."""
    generated: str | None
    token_hits: int | None
    n_tokens: int | None
    logprob: float | None
    exact: bool | None
    extras: str = "{}"
    """JSON object; of locality questions `first_ids`, of choices `chosen` and the log-probability of each, as in a record's."""


@dataclass(frozen=True, slots=True)
class QuestionRow:
    """questions.parquet: the text behind a question id."""

    question_id: str
    event_id: str | None
    split: str
    prompt: str
    image: str | None
    """Key of the picture."""
    answer: str | None
    aliases: list[str]
    topic: str
    choices: list[str] = field(default_factory=list)
    """What is chosen from; empty for other scorings. Chance level is 1 / their number."""
    scoring: str = "generate"
    """One of `testbed.core.events.SCORINGS`."""


@dataclass(frozen=True, slots=True)
class EventRow:
    """events.parquet: the edits in the order in which they were applied."""

    edit_id: str
    kind: str
    step: int
    time: float
    seq: int
    prompt: str
    target: str
    image: str | None
    previous: str | None
    subject: str | None
    relation: str | None
    revises: str | None
    superseded_step: int | None
    """Step at which a later event replaced this one; absent while it is live."""
    source: str


@dataclass(frozen=True, slots=True)
class ScheduleRow:
    """schedule.parquet: everything that will happen, in order, fixed before the run.

    For each step its edits (`action` "edit") and then its probes (`action` "probe"), one row an edit or a
    question asked.
    """

    step: int
    action: str
    """edit | probe"""
    edit_id: str | None
    question_id: str | None
    probe: str
    panel: str
    incl_prob: float
    reason: str
    """Why now: edit | right_after | power | grid | year | end"""


@dataclass(frozen=True)
class EditReport:
    """What one `apply` call says of itself; one JSON line in edits.jsonl.

    `failed` and `skipped` map event ids to reasons; both leave the model as it was for these edits.
    `notes` holds numbers that the method adds (loss, entries, radius, condition number, ...).
    """

    step: int
    event_ids: tuple[str, ...]
    seconds: float = 0.0
    """Wall time of `apply`."""
    peak_bytes: int = 0
    """Peak memory of the process (CPU: resident set) or of the device, after the step."""
    state_bytes: int = 0
    """Bytes of the editor's state after the step."""
    delta_norm: float | None = None
    """Frobenius norm of the accumulated change of weights; absent for editors that change none."""
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)


def folder_name(editor: str) -> str:
    """An editor's folder in a run folder: its name without what paths and shells read in their own way."""
    return re.sub(r"[^\w.,=+-]+", "-", editor).rstrip("-")


def columns(row: type) -> dict[str, tuple[type, bool]]:
    """Field name to (python type, may be absent) of a row dataclass; lists come as `list`."""
    hints = typing.get_type_hints(row)
    return {f.name: _unwrap(hints[f.name]) for f in fields(row)}


def _unwrap(hint: Any) -> tuple[type, bool]:
    if isinstance(hint, types.UnionType):
        inner = [a for a in typing.get_args(hint) if a is not type(None)]
        return inner[0], True
    return (list, False) if typing.get_origin(hint) is list else (hint, False)
