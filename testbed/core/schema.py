# pyright: strict
"""The stored rows: field names, types, units, schema version. Every row is a single observation, never an average.

Files of a run folder OUT (see docs/layout.md): `manifest.json`, `schedule.parquet`, `events.parquet`,
`questions.parquet`, `base/answers.parquet`, `EDITOR/records/step-*.parquet`, `EDITOR/monitors/step-*.parquet`,
`EDITOR/edits.jsonl`.
"""

from __future__ import annotations

import hashlib
import re
import types
import typing
from dataclasses import dataclass, field

SCHEMA_VERSION = 2
"""Incremented when a field or a file is added, removed or changes its meaning."""
_LONGEST_NAME = 200
"""Bytes of a folder's name; file systems allow 255, seed and hash of a run included."""
READABLE_VERSIONS = (1, 2)
"""Versions that analysis reads. A run resumes under its own version only. Version 1 has no monitors and no choices."""


@dataclass(frozen=True, slots=True)
class Record:
    """One answer of one editor at one checkpoint. None means not measured, never zero."""

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
    """The reference: the gold answer, or for locality splits the answer of the unedited model."""
    target: str | None
    """The target of the edit, where the question belongs to one."""
    base_answer: str
    """The generation of the unedited model for this question."""
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
    """JSON object with additions of the editor (entry hit, retrieved facts, ...). Locality questions also have
    `first_ids`, the ids of the ten likeliest first tokens in order; questions with choices have `choices`, the
    log-probability (nats) of each (null where not finite), and `chosen`, the index of the chosen one; refusals have
    `refused`, and for harmful requests `sha256` of the generation instead of its text."""


@dataclass(frozen=True, slots=True)
class MonitorRow:
    """One internal measurement of an edited model after a step (`testbed.monitors`). A missing value has no row."""

    step: int
    name: str
    """The measured quantity: weight_norm, hidden_cosine, entropy, ..."""
    value: float


@dataclass(frozen=True, slots=True)
class BaseAnswer:
    """The answer of the unedited model to one question, measured once and shared by all editors of the run."""

    question_id: str
    answer: str | None
    """The scored text: the gold answer, or for locality splits the generation itself."""
    generated: str | None
    token_hits: int | None
    n_tokens: int | None
    logprob: float | None
    exact: bool | None
    extras: str = "{}"
    """JSON object as in `Record.extras`."""


@dataclass(frozen=True, slots=True)
class QuestionRow:
    """questions.parquet: the content of each question id."""

    question_id: str
    event_id: str | None
    split: str
    prompt: str
    image: str | None
    """Key of the picture."""
    answer: str | None
    aliases: list[str]
    topic: str
    choices: list[str] = field(default_factory=list[str])
    """The choices; empty for scorings without choices. Chance level is 1 / their number."""
    scoring: str = "generate"
    """One of `testbed.core.events.SCORINGS`."""


@dataclass(frozen=True, slots=True)
class EventRow:
    """events.parquet: the edits in the order of their application."""

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
    """Step at which a later event replaced this one; absent if none did."""
    source: str


@dataclass(frozen=True, slots=True)
class ScheduleRow:
    """schedule.parquet: every edit and every question of the run, in order, fixed before the run.

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
    """The report of one `apply` call; one JSON line in edits.jsonl.

    `failed` and `skipped` map event ids to reasons; the model is unchanged by these edits. `notes` holds numbers that
    the method adds (loss, entries, radius, condition number, ...).
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
    """Frobenius norm of the accumulated weight change; absent for editors that change no weights."""
    failed: dict[str, str] = field(default_factory=dict[str, str])
    skipped: dict[str, str] = field(default_factory=dict[str, str])
    notes: dict[str, float] = field(default_factory=dict[str, float])


def folder_name(name: str) -> str:
    """The folder of an editor in a run folder, and of a stream's runs: the name with "-" for characters that paths or shells
    interpret, no dot in front, and the end of one over 200 bytes replaced by its hash."""
    slug = re.sub(r"[^\w.,=+-]+", "-", name).strip("-").lstrip(".-") or "-"
    if len(slug.encode()) <= _LONGEST_NAME:
        return slug
    kept = slug.encode()[: _LONGEST_NAME - 9].decode(errors="ignore")
    return f"{kept}-{hashlib.sha256(slug.encode()).hexdigest()[:8]}"


def columns(row: type) -> dict[str, tuple[type, bool]]:
    """Field name to (Python type, may be None) of a row dataclass; every list type becomes `list`."""
    out: dict[str, tuple[type, bool]] = {}
    for name, hint in typing.get_type_hints(row).items():
        optional = isinstance(hint, types.UnionType)
        inner = next(a for a in typing.get_args(hint) if a is not type(None)) if optional else hint
        out[name] = typing.get_origin(inner) or inner, optional
    return out
