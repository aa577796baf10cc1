"""A whole run in Python: `testbed.study(RunConfig(...))` is what the command line calls."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from streams.arrange import arrange
from streams.base import Stream
from testbed.benchmarks import files as benchmarks
from testbed.core import grading
from testbed.core.events import EditEvent, content_id
from testbed.core.registry import STREAMS
from testbed.core.schema import SCHEMA_VERSION, BaseAnswer, EventRow, QuestionRow, ScheduleRow, folder_name
from testbed.editors.base import Editor
from testbed.experiment import preflight, schedule
from testbed.experiment.config import PLACES, BadConfig, RunConfig, plain, set_fields
from testbed.experiment.interrupt import Stop, Stopped
from testbed.experiment.loop import Context, answer_base, run_editor
from testbed.experiment.track import About, tracking
from testbed.model import handle as models
from testbed.model.difficulty import losses
from testbed.model.handle import ModelHandle
from testbed.model.progress import Bars, bars
from testbed.storage.files import Phase, StoreError, read_json, write_rows
from testbed.storage.run_folder import RunFolder
from testbed.storage.shared_cache import base_answers

SAME = ("config", "model_hash", "stream_hash", "schedule_hash", "schema_version")
"""What a resumed run must share with the stored one."""


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first edit."""

    config: RunConfig
    stream: Stream
    events: list[EditEvent]
    schedule: schedule.Schedule
    handle: ModelHandle
    manifest: dict[str, Any]

    @property
    def out(self) -> Path:
        return self.config.resume or self.config.out or Path("runs") / f"{self.config.stream}-{self.config.seed}-{self.manifest['run'][:8]}"


def check(config: RunConfig) -> None:
    """Raise `BadConfig` with every mistake at once."""
    problems = config.problems()
    if problems:
        raise BadConfig("\n".join(problems))


def prepare(config: RunConfig) -> Plan:
    """Check the configuration, read the stream, fix the schedule, load the model. Nothing is written."""
    check(config)
    stream: Stream = STREAMS.get(config.stream)(config.stream_config())
    events = stream.events(config.edits)
    if not events:
        raise BadConfig(f"{config.stream} ({stream.origin}) yields no edit; skipped records: {len(stream.skipped)}")
    handle = models.load(config.model, config.device, config.dtype, config.device_map)
    handle.shelf = config.cache
    events = arrange(stream, events, lambda adds: losses(handle, adds))
    more = benchmarks.load(config.benchmarks, config.benchmark_config())
    planned = schedule.build(stream, events, schedule.Plan(config.batch, config.seed, config.probe_budget, more.every))
    preflight.check(planned, handle)
    manifest = _manifest(config, stream, events, planned, handle)
    manifest["benchmarks"] = {b.topic: benchmarks.describe(b) for b in more.every}
    manifest["notes"] += [f"benchmark record left out: {line}" for line in more.skipped]
    return Plan(config, stream, events, planned, handle, manifest)


def study(config: RunConfig, say: Callable[[str], None] = lambda line: None, stop: Stop | None = None) -> dict[str, Any]:
    """Run every editor of the configuration over its stream and write the run folder.

    Args:
        config: what to run; with `resume`, the stored configuration is used (see `resumed`).
        say: gets one line for each thing the user should know.
        stop: asked after each batch whether to end there; the state is then saved and `Stopped` raised.

    Returns the summary, as in summary.json. Raises `BadConfig`, `BadStream`, `BadModel`, `StoreError`, `OutOfMemory`.
    """
    plan = prepare(config)
    folder = RunFolder(plan.out)
    for note in plan.manifest["notes"]:
        say(note)
    if config.resume:
        folder.check_same(plan.manifest, SAME, [f"config.{name}" for name in PLACES])
    else:
        folder.check_free()
    with folder.held():
        if not config.resume:
            folder.create(plan.manifest)
        _write_plan(plan, folder)
        with bars() as progress:
            _run(plan, folder, Voice(progress, say, stop or Stop()))
        _save_models(plan, folder, say)
        return finish(plan.out)


def finish(out: Path) -> dict[str, Any]:
    """Summary, figures, tables and report from the stored answers of a run folder.

    Returns the summary as stored; its `run` also says in which `folder` it lies. Raises `StoreError` where they
    cannot be written.
    """
    from analysis.reporting.report import write_all

    try:
        write_all([out])
    except OSError as e:
        remedy = f"Every answer is stored; make it with python -m analysis {out}"
        raise StoreError(f"the report in {out} cannot be written: {e}. {remedy}") from e
    summary = read_json(out / "summary.json")
    return {**summary, "run": {**summary["run"], "folder": str(out)}}


def resumed(out: Path) -> RunConfig:
    """The configuration of a stored run, set to go on with it. Raises `StoreError`."""
    stored = RunFolder(out).manifest().get("config")
    if not isinstance(stored, dict):
        raise StoreError(f"{out / 'manifest.json'} holds no configuration: it is not the manifest of a run")
    known = {f.name for f in fields(RunConfig)}
    return replace(set_fields(RunConfig(), {k: v for k, v in stored.items() if k in known}), resume=out)


def make_editor(config: RunConfig, name: str) -> Editor:
    """A fresh editor with its `--set` fields and what stands in its brackets."""
    return config.editor_class(name)(config.editor_config(name), config.seed)


@dataclass(frozen=True)
class Voice:
    """How a run tells what it does, and is told to stop."""

    progress: Bars
    say: Callable[[str], None]
    stop: Stop


def _run(plan: Plan, folder: RunFolder, voice: Voice) -> None:
    config, phase = plan.config, phase_log(plan.config.log)

    def note(line: str) -> None:
        voice.say(line)
        folder.add_note(line)

    numbers = (config.max_new_tokens, config.save_every, note, voice.stop)
    try:
        base = _base_answers(plan, folder, voice)
        context = Context(plan.manifest["run"], config.seed, plan.handle, plan.stream, plan.schedule, base, *numbers)
        for name in config.editor:
            editor = make_editor(config, name)
            _end_if_asked(voice.stop, f"stopped before {name}")
            with tracking(config.track, About(plan.out, context.run, name, config.stored())) as saved:
                place = folder.editor(name, phase, saved)
                run_editor(context, editor, place, phase, lambda *a, name=name: voice.progress.advance(name, *a))
    except Stopped as e:
        raise Stopped(f"{e}; everything up to there is saved. Go on with --resume {plan.out}") from e


def _base_answers(plan: Plan, folder: RunFolder, voice: Voice) -> dict[str, BaseAnswer]:
    """The unedited model's answers by question id, asked where they are not stored. Raises `Stopped`."""
    base = folder.base_answers()
    questions = list(plan.schedule.unique_questions.values())
    if set(base) == {q.id for q in questions}:
        return base

    def progress(*now: Any) -> None:
        _end_if_asked(voice.stop, "stopped while the unedited model was asked")
        voice.progress.advance("unedited model", *now)

    asked = (plan.handle, questions, plan.config.max_new_tokens)
    answers = base_answers(plan.config.cache, *asked, lambda: answer_base(*asked, progress))
    folder.write_base_answers(answers)
    return {a.question_id: a for a in answers}


def _end_if_asked(stop: Stop, where: str) -> None:
    if stop.asked:
        raise Stopped(where)


def _write_plan(plan: Plan, folder: RunFolder) -> None:
    write_rows(folder.path / "schedule.parquet", ScheduleRow, plan.schedule.rows())
    write_rows(folder.path / "events.parquet", EventRow, plan.schedule.event_rows())
    write_rows(folder.path / "questions.parquet", QuestionRow, plan.schedule.question_rows())


def _save_models(plan: Plan, folder: RunFolder, say: Callable[[str], None]) -> None:
    """The edited model of every editor that changes weights, as save_pretrained writes it."""
    target = plan.config.save_model
    if target is None:
        return
    for name in plan.config.editor:
        editor = make_editor(plan.config, name)
        if not editor.traits.weights:
            say(f"{name} changes no weights of the model, so there is no edited model to save")
            continue
        editor.prepare(plan.handle, plan.stream.train_pool())
        editor.load_state_dict(folder.editor(name).newest_state())
        place = target / folder_name(name)
        with plan.handle.swapped(editor.edited_weights()):
            plan.handle.model.save_pretrained(place)
        (plan.handle.processor or plan.handle.tokenizer).save_pretrained(place)
        say(f"{name}: edited model written to {place}")


def _manifest(
    config: RunConfig, stream: Stream, events: list[EditEvent], planned: schedule.Schedule, handle: ModelHandle
) -> dict[str, Any]:
    hashes = {"model_hash": handle.hash, "stream_hash": stream.stream_hash(events), "schedule_hash": planned.hash}
    return {
        "run": content_id(config.identity(), hashes),
        "schema_version": SCHEMA_VERSION,
        "grading_version": grading.VERSION,
        "config": config.stored(),
        "editors": list(config.editor),
        "references": [name for name in config.editor if make_editor(config, name).traits.told_truth],
        "editor_configs": {name: plain(config.editor_config(name)) for name in config.editor},
        "stream": stream.manifest(),
        "model": {"name": handle.name, "hash": handle.hash, "family": handle.family.name, "parameters": _size(handle)},
        **hashes,
        "seed": config.seed,
        "edits": len(events),
        "years": len({e.year for e in events}),
        "steps": len(planned.steps),
        "questions": planned.n_questions,
        "panel_scale": planned.scale,
        "device": str(handle.device),
        "dtype": str(handle.dtype).removeprefix("torch."),
        "versions": _versions(),
        "git": git_commit(),
        "notes": _notes(config, stream, events, planned, handle),
    }


def _notes(config: RunConfig, stream: Stream, events: list[EditEvent], planned: schedule.Schedule, handle: ModelHandle) -> list[str]:
    """Everything that stands in, was skipped or cut, one line each: said on screen and kept."""
    out = [f"{config.stream}: {stream.origin}; its time axis is {stream.time_axis}"]
    if config.data_root is None and stream.time_axis != type(stream).time_axis:
        out.append("no --data-root was given: the simulated world stands in for files")
    if (order := stream.config.order) != "drawn":
        out.append(f"the same edits as without stream.order, in another order: {order}")
    if stream.skipped:
        reasons = stream.manifest()["skipped_by_reason"]
        out.append(f"{len(stream.skipped)} records were skipped: " + "; ".join(f"{n} x {r}" for r, n in sorted(reasons.items())))
    if len(events) < config.edits:
        out.append(f"the stream holds {len(events)} edits, {config.edits} were asked for")
    if planned.scale < 1:
        out.append(f"panels were shrunk to {100 * planned.scale:.2g} % to keep to {config.probe_budget} questions per 500 edits")
    return out + handle.notes


def _size(handle: ModelHandle) -> int:
    return sum(p.numel() for p in handle.model.parameters())


def _versions() -> dict[str, str]:
    out = {"python": platform.python_version()}
    for name in ("torch", "transformers", "numpy", "pyarrow", "pandas", "lifelong-editing-testbed"):
        try:
            out[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            out[name] = "not installed as a package"
    return out


def git_commit() -> str | None:
    """Commit of the source tree, with + when it has changes; None outside a repository."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=10)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def phase_log(path: Path | None) -> Phase:
    """A function that appends "phase step" lines to a file as phases begin; does nothing without a file."""

    def write(name: str, step: int) -> None:
        if path is not None:
            with open(path, "a", encoding="utf-8") as f:
                f.write(f"{name} {step}\n")

    return write
