# pyright: strict
"""The loop: apply an edit batch, ask the questions of the step, save. It knows no editor, stream or probe by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from streams.base import Stream, TrainPool
from testbed.core.events import EditBatch
from testbed.core.schema import EditReport, Record
from testbed.editors.base import Editor
from testbed.experiment.answering import AnswerContext, Progress, ask_step, no_progress
from testbed.experiment.interrupt import Stopped, StopRequest
from testbed.experiment.memory import peak_bytes, reset_peak
from testbed.experiment.schedule import Schedule, Step
from testbed.model.handle import ModelHandle
from testbed.monitors.base import MonitorPanel
from testbed.storage.files import Phase
from testbed.storage.run_folder import EditorFolder, ExpectedContents, StepResults


@dataclass(frozen=True)
class Context(AnswerContext):
    """Everything that the editors of a run share."""

    handle: ModelHandle
    stream: Stream
    schedule: Schedule
    save_every: int = 50
    """Edits between two saves."""
    say: Callable[[str], None] = no_progress
    """Callback for notes of an editor (a stand-in, derived defaults) and of the model (out of memory), one line each."""
    stop: StopRequest = field(default_factory=StopRequest)
    """Checked after each step."""

    def train_pool(self) -> TrainPool:
        """What an editor may learn from; its edits are compared with the run's, and refused where they touch one."""
        edits = [a.event for step in self.schedule.steps for a in step.edits]
        return self.stream.train_pool().apart_from(edits, self.schedule.unique_questions.values(), self.say)

    @cached_property
    def watch(self) -> MonitorPanel:
        """The monitors, on the stream's general questions or, if none is scheduled, on questions about edits; never on benchmarks."""
        general, scheduled = {q.id for q in self.stream.general()}, self.schedule.unique_questions.values()
        return MonitorPanel(self.handle, [q for q in scheduled if q.id in general] or [q for q in scheduled if q.event_id], self.seed)

    @cached_property
    def expected(self) -> ExpectedContents:
        """The contents of the folder of a finished editor."""
        steps = self.schedule.steps
        monitored = frozenset(s.checkpoint.step for s in steps if self.watch.due(s.checkpoint))
        return ExpectedContents([len(s.questions) for s in steps], monitored)


def run_editor(
    context: Context, editor: Editor, folder: EditorFolder, phase: Phase = no_progress, progress: Progress = no_progress
) -> None:
    """Take one editor through the schedule, from its newest saved step. Raises `Stopped` after a requested stop.

    Args:
        phase: callback for the start of each phase (resume, apply, probe) and its step.
        progress: callback after each step with edits made, edits in total, and the success right after the step.
    """
    phase("resume", 0)
    done, state = folder.resume(context.expected, context.say)
    steps = context.schedule.steps
    if done == len(steps):
        return
    if not reset_peak(context.handle.device):
        context.say("this system cannot reset its record of peak memory: peak_bytes is that of the whole process, earlier editors included")
    editor.prepare(context.handle, context.train_pool())
    n_notes = _say_notes(context, editor, 0)
    if state is not None:
        editor.load_state_dict(state)
    results, saved = StepResults(), steps[done - 1].checkpoint.edits if done else 0
    for step in steps[done:]:
        n, edits = step.checkpoint.step, step.checkpoint.edits
        phase("apply", n)
        results.reports.append(apply_step(context, editor, step))
        phase("probe", n)
        records = ask_step(context, editor, step)
        results.records.extend(records)
        if context.watch.due(step.checkpoint):
            results.monitors.extend(context.watch.rows(n, editor.predictor(), editor.edited_weights()))
        n_notes = _say_notes(context, editor, n_notes)
        progress(edits, steps[-1].checkpoint.edits, _success(records))
        if edits - saved >= context.save_every or step is steps[-1] or context.stop.requested:
            folder.save(n, results, editor.state_dict())
            results, saved = StepResults(), edits
        if context.stop.requested and step is not steps[-1]:
            raise Stopped(f"{editor.name}: stopped after step {n} of {len(steps)}")


def _say_notes(context: Context, editor: Editor, n_notes: int) -> int:
    """Pass on all notes of the model and those of the editor after the first `n_notes`; return the editor's number of notes."""
    for note in editor.notes[n_notes:]:
        context.say(f"{editor.name}: {note}")
    for note in context.handle.memory_limit.notes:
        context.say(note)
    context.handle.memory_limit.notes.clear()
    return len(editor.notes)


def apply_step(context: Context, editor: Editor, step: Step) -> EditReport:
    """Make the edits of a step with one `apply` call; the report has its wall time and the editor's peak memory up to now."""
    events = tuple(a.event for a in step.edits)
    closes = bool(step.checkpoint.reasons & {"year", "end"})
    batch = EditBatch(events, step.checkpoint.step, {e.id: context.stream.paraphrases(e) for e in events}, closes)
    start = time.perf_counter()
    report = editor.apply(batch)
    return replace(report, seconds=time.perf_counter() - start, peak_bytes=peak_bytes(context.handle.device))


def _success(records: Sequence[Record]) -> float | None:
    """Share of right generations among the immediate `edit` questions; None where there are none."""
    exact = [bool(r.exact) for r in records if r.panel == "immediate" and r.split == "edit"]
    return sum(exact) / len(exact) if exact else None
