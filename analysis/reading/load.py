"""Read a run folder into data frames of numbers, without averages and without filled-in values.

Texts stay on disk until a report needs them: questions and edits are row numbers of `Run.questions` and
`Run.events`, scores are floats with nan for "not measured".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from analysis.reading.clusters import number_clusters
from analysis.reading.records import BadRun, edits_at, part_files, read_base, read_records, read_table
from testbed.core.checksums import DAMAGED, SUMS, is_damaged, read_lines
from testbed.core.schema import READABLE_VERSIONS, folder_name


@dataclass(frozen=True)
class EditorRun:
    """All answers of one editor.

    `records` has one row for each answer: question, edit (row numbers, -1 for none), step, time, probe, split, topic,
    role, tf, tf_exact, gen, begins, contains (see `SCORING_MODES`), logprob (nats), n_tokens, weight (1 / inclusion
    probability), age (edits applied since), made (step of the edit), live (applied and not superseded when asked), cluster,
    asked (id of the distinct question). `reports` has one row for each step of edits.jsonl. `base` has the unedited model's
    scores, one row for each question of `Run.questions`.
    """

    name: str
    folder: Path
    records: pd.DataFrame
    reports: pd.DataFrame
    base: pd.DataFrame


@dataclass(frozen=True)
class Run:
    """One run, or several of the same schedule, in memory."""

    folders: tuple[Path, ...]
    manifest: dict[str, Any]
    events: pd.DataFrame
    questions: pd.DataFrame
    editors: dict[str, EditorRun]
    planned_step: int
    """Last step of the schedule; a run cut short ends before it."""
    clusters: int
    """Number of clusters of questions that depend on each other (`analysis.reading.clusters`)."""
    notes: list[str] = field(default_factory=list)

    @property
    def time_axis(self) -> str:
        return str(self.manifest.get("stream", {}).get("time_axis", "simulated"))

    def edits_at(self, step: np.ndarray) -> np.ndarray:
        """Number of edits applied after each of the given steps."""
        return edits_at(self.events, step)


def load_run(path: str | Path) -> Run:
    """The run in a folder. Raises `BadRun`, which says what to do, where the folder cannot be read."""
    folder = Path(path)
    manifest = _manifest(folder)
    events, questions = _events(folder), read_table(folder / "questions.parquet").to_pandas()
    base, grade = read_base(folder, events, questions, manifest.get("grading_version"))
    notes = list(manifest.get("notes", []))
    run = Run((folder,), manifest, events, questions, {}, 0, number_clusters(events, questions))
    for name in _editor_names(folder, manifest):
        own = folder / folder_name(name)
        records, more = read_records(own, events, questions, grade)
        notes += [f"{name}: {m}" for m in more if name not in manifest.get("references", ())]
        if records is not None:
            run.editors[name] = EditorRun(name, own, records, _reports(own), base)
    if not run.editors:
        raise BadRun(f"{folder}: no editor has records yet (looked for EDITOR/records/step-*.parquet); start or resume the run first")
    planned, probes = _schedule(folder, events)
    return replace(run, planned_step=planned, notes=notes + _shortfalls(run, planned, probes))


def side_by_side(runs: Sequence[Run]) -> Run:
    """Joins runs of one schedule into one with all their editors; an editor name that occurs twice gets its folder's name."""
    names = [n for r in runs for n in r.editors]
    editors = {}
    for run in runs:
        for name, editor in run.editors.items():
            label = name if names.count(name) == 1 else f"{name} ({run.folders[0].name})"
            editors[label] = replace(editor, name=label)
    notes = list(dict.fromkeys(n for r in runs for n in r.notes))
    return replace(runs[0], folders=tuple(f for r in runs for f in r.folders), editors=editors, notes=notes)


def texts(editor: EditorRun, question_ids: Iterable[str], steps: Iterable[int]) -> pd.DataFrame:
    """The generated texts for a few questions at a few steps: question_id, probe_step, probe, target, answer, generated."""
    columns = ["question_id", "probe_step", "probe", "target", "answer", "generated"]
    steps = list(steps)
    wanted = [("probe_step", "in", steps), ("question_id", "in", list(question_ids))]
    parts = [pq.read_table(p, columns=columns, filters=wanted).to_pandas() for p in part_files(editor.folder, steps)]
    return pd.concat(parts or [pd.DataFrame(columns=columns)], ignore_index=True)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise BadRun(f"{path} is missing: {folder} is not a run folder (expected what `python -m testbed.run --out` writes)")
    if is_damaged(path):
        raise BadRun(f"{path} {DAMAGED}; restore it from a copy")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise BadRun(f"{path} is not JSON ({error}); the run was stopped while it was written, start it again") from error
    if manifest.get("checksums") and not (folder / SUMS).is_file():
        raise BadRun(f"{folder / SUMS} is missing, so nothing says whether the run is as it was written; restore it from a copy")
    version = manifest.get("schema_version")
    if version not in READABLE_VERSIONS:
        known = ", ".join(map(str, READABLE_VERSIONS))
        raise BadRun(f"{path}: written with schema version {version}, this analysis reads {known}; use the release that wrote it")
    return manifest


def _events(folder: Path) -> pd.DataFrame:
    events = read_table(folder / "events.parquet").to_pandas()
    if events.empty:
        raise BadRun(f"{folder / 'events.parquet'} has no edits: the run is empty, start it with --edits 1 or more")
    events["superseded_step"] = events["superseded_step"].astype(float)
    return events


def _editor_names(folder: Path, manifest: dict[str, Any]) -> list[str]:
    names = [e if isinstance(e, str) else e["name"] for e in manifest.get("editors", [])]
    return names or sorted(p.parent.name for p in folder.glob("*/records"))


def _reports(folder: Path) -> pd.DataFrame:
    path = folder / "edits.jsonl"
    rows, damaged = read_lines(path)
    if damaged:
        raise BadRun(f"{path}, line {damaged[0]} is damaged: it is not what was written; --resume makes the editor again")
    names = ["step", "event_ids", "seconds", "peak_bytes", "state_bytes", "delta_norm", "failed", "skipped", "notes"]
    frame = pd.DataFrame(rows, columns=names)
    return frame.drop_duplicates("step", keep="last")


def _schedule(folder: Path, events: pd.DataFrame) -> tuple[int, np.ndarray]:
    """The last step, and the step of every planned answer; of a run without a schedule the last edit's step and none."""
    path = folder / "schedule.parquet"
    if not path.is_file():
        return int(events["step"].max()), np.empty(0, int)
    table = read_table(path, ("step", "action"))
    steps = np.asarray(table["step"])
    return int(steps.max(initial=0)), steps[np.asarray(table["action"]) == "probe"]


def _shortfalls(run: Run, planned: int, probes: np.ndarray) -> list[str]:
    """Notes on editors whose answers end before the last step, and on answers and reports of steps that are missing up to their end."""
    ends = {name: int(e.records["step"].max()) for name, e in run.editors.items()}
    notes = [f"{n}: cut short at step {end} of {planned}; its numbers are of that moment" for n, end in ends.items() if end < planned]
    counts = {n: (len(e.records), int((probes <= ends[n]).sum())) for n, e in run.editors.items()}
    short = {n: (want - got, want) for n, (got, want) in counts.items() if got < want}
    notes += [f"{n}: {less:,} of {want:,} answers are missing; --resume makes them again" for n, (less, want) in short.items()]
    unreported = {n: ends[n] - int(e.reports["step"].between(1, ends[n]).sum()) for n, e in run.editors.items()}
    lost = "edits.jsonl lacks the reports of {} of {} steps, so costs are those of the others; --resume makes them again"
    return notes + [f"{n}: {lost.format(less, ends[n])}" for n, less in unreported.items() if less]


def differing(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """The fields of two manifests that differ, with both values."""
    keys = [k for k in sorted({*ours, *theirs}) if k not in ("run", "notes", "editors") and ours.get(k) != theirs.get(k)]
    return "; ".join(f"{k}: {_short(ours.get(k))} / {_short(theirs.get(k))}" for k in keys)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
