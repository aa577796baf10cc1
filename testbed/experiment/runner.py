"""A whole run, as the command line and `testbed.study` make it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from transformers.utils import logging

from streams.arrange import arrange
from streams.base import Stream
from testbed.core.events import Ask, EditEvent
from testbed.core.schema import BaseAnswer, EventRow, QuestionRow, ScheduleRow, folder_name
from testbed.editors.base import Editor
from testbed.experiment import preflight, schedule
from testbed.experiment.answering import Progress, answer_base
from testbed.experiment.beliefs import Belief, belief, kept_events
from testbed.experiment.config import LOCATIONS, BadConfig, ResolvedRun, RunConfig
from testbed.experiment.interrupt import Stopped, StopRequest
from testbed.experiment.loop import Context, run_editor
from testbed.experiment.manifest import manifest_of
from testbed.experiment.protocols import prompt_of
from testbed.experiment.saved_models import save_models
from testbed.experiment.side_by_side import RunOne, WorkerMessages, run_side_by_side, workers
from testbed.experiment.track import TrackedRun, tracking
from testbed.model.difficulty import losses
from testbed.model.handle import ModelHandle
from testbed.model.loading import load
from testbed.model.progress import Bars, bars
from testbed.model.prompt_forms import OWN_FORM, QUESTIONS, ChosenForm, PromptForm, choose, forms, show_examples, use
from testbed.storage.files import Phase, StoreError, read_json, write_rows
from testbed.storage.run_folder import RunFolder
from testbed.storage.shared_cache import base_answers

SAME = ("config", "model_hash", "stream_hash", "schedule_hash", "schema_version", "plugins")
"""Entries of the manifest in which a resumed run must equal the stored one."""


@dataclass(frozen=True)
class PreparedRun:
    """Everything that is fixed before the first edit."""

    resolved: ResolvedRun
    stream: Stream
    events: list[EditEvent]
    schedule: schedule.Schedule
    handle: ModelHandle
    prompt: ChosenForm
    belief: Belief | None
    """What the model makes of the old answers; None where the edits have none."""
    max_new_tokens: int
    """Longest free generation, in tokens, that fits into the model's window behind every prompt."""

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What manifest.json says about the run."""
        return manifest_of(self)

    @property
    def config(self) -> RunConfig:
        return self.resolved.config

    @property
    def out(self) -> Path:
        """The run folder."""
        default = Path("runs") / f"{folder_name(self.config.stream)}-{self.config.seed}-{self.manifest['run'][:8]}"
        return self.config.resume or self.config.out or default

    def editor(self, name: str) -> Editor:
        """A new editor, bound to the model, before its first edit."""
        editor = self.resolved.editors[name].create()
        editor.prepare(self.handle, self.stream.train_pool())
        return editor

    def context(self, base: Mapping[str, BaseAnswer], **more: Any) -> Context:
        """The context of the loop. `base`: the unedited model's answers by question id; `more`: other fields of `Context`."""
        answers = (self.manifest["run"], self.config.seed, base, self.max_new_tokens)
        return Context(*answers, self.handle, self.stream, self.schedule, self.config.save_every, **more)


def prepare(resolved: ResolvedRun) -> PreparedRun:
    """Read the stream, load the model and fix the schedule. Nothing is written.

    Raises `BadConfig`, `BadStream`, `BadModel`, `BadPicture`.
    """
    config = resolved.config
    stream = resolved.stream.create()
    events = stream.events(config.edits)
    if not events:
        raise BadConfig(f"{config.stream} ({stream.origin}) yields no edit; skipped records: {len(stream.skipped)}")
    handle = load(config.model, config.device, config.dtype, config.device_map)
    handle.cache_folder, handle.data_root = config.cache, config.data_root
    chosen = ask_in_form(resolved, stream, len(events), handle)
    if stream.config.keep != "all":
        events = kept_events(stream, config.edits, handle, RunFolder(config.resume).event_ids() if config.resume else ())
    events = arrange(stream, events, lambda adds: losses(handle, adds))
    planned = schedule.build(stream, events, resolved.schedule_config())
    preflight.check(planned, handle)
    held, new_tokens = _belief(config, handle, events), preflight.new_tokens(planned, handle, config.max_new_tokens)
    return PreparedRun(resolved, stream, events, planned, handle, chosen, held, new_tokens)


def _belief(config: RunConfig, handle: ModelHandle, events: list[EditEvent]) -> Belief | None:
    """What the model makes of the old answers; a run that goes on has asked already."""
    if config.resume is None:
        return belief(handle, events)
    stored = RunFolder(config.resume).manifest().get("belief")
    return Belief(**stored) if stored else None


def ask_in_form(resolved: ResolvedRun, stream: Stream, taken: int, handle: ModelHandle) -> ChosenForm:
    """Choose the form in which the model is asked, and ask it so from now on. A run that goes on keeps its form.

    taken: number of edits of the run; a form is chosen by the old answers of the stream's next edits. Raises `BadConfig`.
    """
    config, own = resolved.config, PromptForm(OWN_FORM, handle.family.text, handle.family.answer)
    stored = RunFolder(config.resume).manifest().get("prompt") if config.resume else None
    if (config.resume and stored is None) or (config.prompt == "auto" and own.text != PromptForm.text):
        return ChosenForm(own)
    if handle.reads_pictures and config.prompt == prompt_of(config.protocol):  # a protocol's form is one of text models
        return ChosenForm(own)
    if handle.reads_pictures:
        raise BadConfig(f"--prompt {config.prompt}: {handle.name} reads pictures and is asked in its family's own form")
    show_examples(handle, stream.examples())
    known = [] if stored or config.prompt != "auto" else _development(stream, taken)
    found = forms(handle)
    if stored:
        chosen = ChosenForm(PromptForm(stored["form"], stored["text"], stored["answer"]), stored["shares"])
    elif config.prompt == "auto":
        chosen = choose(handle, known) if known else ChosenForm(own)
    elif config.prompt in found:
        chosen = ChosenForm(found[config.prompt])
    else:
        lacks = "the stream has no examples" if config.prompt == "examples" else "its tokenizer has no chat template"
        raise BadConfig(f"--prompt {config.prompt} cannot be had for {handle.name}: {lacks}; there are {', '.join(found)}")
    use(handle, chosen.form)
    return chosen


def _development(stream: Stream, taken: int) -> list[tuple[Ask, str]]:
    """Prompts with their old answers about facts that the run does not edit; of a stream without further edits those of the run."""
    events = stream.events(taken + 10 * QUESTIONS)
    later = [e for e in events[taken:] if e.kind == "add" and e.previous] or [e for e in events if e.kind == "add" and e.previous]
    return [(e.ask(), e.previous or "") for e in later]


def study(
    config: RunConfig, say: Callable[[str], None] = lambda line: None, stop: StopRequest | None = None, report: bool = True
) -> dict[str, Any]:
    """Run every editor of the configuration over its stream and write the run folder.

    Args:
        config: the run; with `resume`, the stored configuration (see `stored_config`).
        say: callback for messages to the user, one line each.
        stop: checked after each step; once it is requested, the run saves its state and raises `Stopped`.
        report: without it the answers alone are written, and the summary is empty.

    Returns the summary, as in summary.json. Raises `BadConfig`, `BadStream`, `BadModel`, `StoreError`, `OutOfMemory`.
    """
    if config.out and not config.resume:
        RunFolder(config.out).check_free()
    run, stop = prepare(config.resolve()), stop or StopRequest()
    folder = RunFolder(run.out)
    for note in run.manifest["notes"]:
        say(note)
    if config.resume:
        _check_same(run, folder)
    else:
        folder.check_free()
    with folder.locked():
        if not config.resume:
            folder.create(run.manifest)
        for note in [e.note for e in run.resolved.editors.values() if e.note]:
            folder.add_note(note)
        write_rows(folder.path / "schedule.parquet", ScheduleRow, run.schedule.rows())
        write_rows(folder.path / "events.parquet", EventRow, run.schedule.event_rows())
        write_rows(folder.path / "questions.parquet", QuestionRow, run.schedule.question_rows())
        with bars() as shown:
            _run_editors(run, folder, shown, say, stop)
        summary = finish(run.out) if report else {}
        save_models(run, folder, say)
        return summary


def _check_same(run: PreparedRun, folder: RunFolder) -> None:
    folder.check_same(run.manifest, SAME, [f"config.{name}" for name in LOCATIONS], RunConfig().stored())


def finish(out: Path) -> dict[str, Any]:
    """Make summary, figures, tables and report from the stored answers of a run folder.

    Returns the stored summary; its `run` also has the `folder`. Raises `StoreError` where the report cannot be written.
    """
    from analysis.reporting.report import write_all  # imported here: pandas and matplotlib are heavy, and a dry run needs neither

    try:
        write_all([out])
    except OSError as e:
        remedy = f"Every answer is stored; make it with python -m analysis {out}"
        raise StoreError(f"the report in {out} cannot be written: {e}. {remedy}") from e
    summary = read_json(out / "summary.json")
    return {**summary, "run": {**summary["run"], "folder": str(out)}}


def _run_editors(run: PreparedRun, folder: RunFolder, shown: Bars, say: Callable[[str], None], stop: StopRequest) -> None:
    config, names = run.config, list(run.resolved.editors)

    def note(line: str) -> None:
        say(line)
        folder.add_note(line)

    try:
        context = run.context(_base_answers(run, folder, shown, stop), say=note, stop=stop)
        jobs, few = workers(config.jobs, len(names), run.handle)
        if few:
            say(few)
        if jobs > 1:
            note(f"{jobs} editors at a time, each in a process of its own (--jobs): the seconds of an edit are those beside others")
            again = replace(config, out=None, resume=run.out, jobs=1)
            run_side_by_side(partial(reopened, again), names, jobs, stop, WorkerMessages(note, shown.advance))
            return
        for name in names:
            stop.check(f"stopped before {name}")
            run_one(run, context, name, lambda *now, name=name: shown.advance(name, *now))
    except Stopped as e:
        raise Stopped(f"{e}; everything up to there is saved. Go on with --resume {run.out}") from e


def run_one(run: PreparedRun, context: Context, name: str, progress: Progress) -> None:
    """Take one editor through the schedule, from its newest saved step. Raises `Stopped`."""
    phase = phase_log(run.config.log)
    with tracking(run.config.track, TrackedRun(run.out, context.run, name, run.config.stored())) as saved:
        run_editor(context, run.resolved.editors[name].create(), RunFolder(run.out).editor(name, phase, saved), phase, progress)


def reopened(config: RunConfig, say: Callable[[str], None], stop: StopRequest) -> RunOne:
    """How a worker runs an editor of a folder in which the unedited model has been asked.

    config: the run, with `resume`. Raises what `prepare` raises, and `StoreError` where the folder is another run's.
    """
    logging.disable_progress_bar()  # the loading bars of transformers
    run = prepare(config.resolve())
    folder = RunFolder(run.out)
    _check_same(run, folder)
    return partial(run_one, run, run.context(folder.base_answers(), say=say, stop=stop))


def _base_answers(run: PreparedRun, folder: RunFolder, shown: Bars, stop: StopRequest) -> dict[str, BaseAnswer]:
    """The unedited model's answers by question id, computed where they are not stored. Raises `Stopped`."""
    base = folder.base_answers()
    questions = list(run.schedule.unique_questions.values())
    if set(base) == {q.id for q in questions}:
        return base

    def progress(*now: Any) -> None:
        stop.check("stopped while the unedited model was asked")
        shown.advance("unedited model", *now)

    what = (run.handle, questions, run.max_new_tokens)
    answers = base_answers(run.config.cache, *what, lambda: answer_base(*what, progress))
    folder.write_base_answers(answers)
    return {a.question_id: a for a in answers}


def phase_log(path: Path | None) -> Phase:
    """A callback that appends "phase step" lines to a file; without a file it does nothing."""

    def write(name: str, step: int) -> None:
        if path is not None:
            with open(path, "a", encoding="utf-8") as f:
                f.write(f"{name} {step}\n")

    return write
