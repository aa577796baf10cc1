"""The outline of a run for its dry run: the exact schedule of its first edits, and by it the counts of all of them.

A schedule of millions of edits is never built. Its first 500 edits are, and every count is multiplied by the number of
edits over theirs; panels grow with the edits made until their budget holds, so a longer run asks about as many an edit.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

from streams.base import Stream
from testbed.core.events import EditEvent, Question
from testbed.experiment import preflight, runner, schedule
from testbed.experiment.config import BadConfig, ResolvedRun
from testbed.experiment.runner import PreparedRun
from testbed.experiment.schedule import GRID, Schedule, ScheduledQuestion
from testbed.model.handle import ModelHandle
from testbed.model.loading import load
from testbed.model.prompt_forms import OWN_FORM, ChosenForm, PromptForm, forms, show_examples, use

MOST_READ = 20_000
"""Events that are read from a stream at most, to learn where it ends."""
CHECKED = 50
"""Edits whose pictures, answers and prompt lengths the dry run checks."""
Kind = tuple[str, str]
"""A kind of question: its panel's column (right after, panels, benchmarks), and how it is answered."""


@dataclass(frozen=True)
class Outline:
    """The first edits of a run and what follows from them.

    run: prepared as if it ended with these edits. edits: number of edits of the whole run. notes: what a reader of the estimate
    must know, a line each.
    """

    run: PreparedRun
    edits: int
    notes: list[str]

    @property
    def exact(self) -> bool:
        return self.edits == len(self.run.events)

    @property
    def times(self) -> float:
        """Edits of the whole run over those of its schedule here."""
        return self.edits / len(self.run.events)

    @property
    def schedule(self) -> Schedule:
        return self.run.schedule

    @cached_property
    def kinds(self) -> dict[Kind, list[ScheduledQuestion]]:
        """The questions of one editor by kind."""
        out: dict[Kind, list[ScheduledQuestion]] = {}
        for q in (q for s in self.schedule.steps for q in s.questions):
            out.setdefault(kind_of(q), []).append(q)
        return out

    @cached_property
    def unique(self) -> dict[Kind, list[Question]]:
        """The different questions by the kind in which they come first."""
        once: dict[str, Kind] = {}
        found: dict[str, Question] = {}
        for kind, questions in self.kinds.items():
            for q in questions:
                once.setdefault(q.plan.question.id, kind)
                found.setdefault(q.plan.question.id, q.plan.question)
        out: dict[Kind, list[Question]] = {kind: [] for kind in self.kinds}
        for name, kind in once.items():
            out[kind].append(found[name])
        return out

    @cached_property
    def untold(self) -> Counter[Kind]:
        """How many questions of each kind are about no edit, so that nobody is told their answer."""
        return Counter(kind_of(q) for s in self.schedule.steps for q in s.questions if q.plan.edit is None)

    def count(self, n: float) -> str:
        """A count of the schedule, taken to the whole run; with a tilde where it is extrapolated."""
        return f"{n:,.0f}" if self.exact else f"~{n * self.times:,.0f}"


def kind_of(question: ScheduledQuestion) -> Kind:
    column = {"immediate": "right after", "benchmark": "benchmarks"}.get(question.plan.panel, "panels")
    asked = question.plan.question
    return column, "text" if asked.split == "text" else asked.scoring


def outline(resolved: ResolvedRun) -> Outline:
    """Load the model and fix the schedule of the first edits. Nothing is written, and the model is asked nothing.

    Raises `BadConfig`, `BadStream`, `BadModel`, `BadPicture`.
    """
    config, stream = resolved.config, resolved.stream.create()
    read = stream.events(min(config.edits, MOST_READ))
    if not read:
        raise BadConfig(f"{config.stream} ({stream.origin}) yields no edit; skipped records: {len(stream.skipped)}")
    ended = len(read) < min(config.edits, MOST_READ)
    edits, events = len(read) if ended else config.edits, read[:GRID]
    notes = [f"the stream holds {len(read):,} edits, {config.edits:,} were asked for"] if ended else []
    handle = load(config.model, config.device, config.dtype, config.device_map)
    handle.cache_folder, handle.data_root = config.cache, config.data_root
    resolved = replace(resolved, config=replace(config, edits=len(events)))
    form = _form(resolved, stream, len(events), handle, notes)
    if stream.config.keep != "all":
        notes.append(f"stream.keep={stream.config.keep}: which facts are kept is asked when the run begins; all are counted")
    planned = schedule.build(stream, events, resolved.schedule_config())
    new_tokens = _check(planned, handle, config.max_new_tokens)
    run = PreparedRun(resolved, stream, events, planned, handle, form, None, new_tokens)
    return Outline(run, edits, [*notes, *_length_notes(events, edits, len(read), ended)])


def _length_notes(events: list[EditEvent], edits: int, read: int, ended: bool) -> list[str]:
    if edits == len(events):
        return []
    end = "" if ended or edits <= read else f"; the stream was read up to edit {read:,} and may end before edit {edits:,}"
    return [f"the schedule of the first {len(events):,} edits is exact, and numbers with ~ are extrapolated from it to {edits:,}{end}"]


def _check(planned: Schedule, handle: ModelHandle, wanted: int) -> int:
    """Check the first edits as a run checks all of them, and return the longest generation, in tokens, that fits behind their prompts."""
    first = Schedule(tuple(s for s in planned.steps if s.checkpoint.before < CHECKED), planned.scale)
    preflight.check(first, handle)
    return preflight.new_tokens(first, handle, wanted)


def _form(resolved: ResolvedRun, stream: Stream, taken: int, handle: ModelHandle, notes: list[str]) -> ChosenForm:
    """The form of prompts. Where the run chooses one by asking the model, the longest stands for it."""
    own = PromptForm(OWN_FORM, handle.family.text, handle.family.answer)
    if resolved.config.resume or resolved.config.prompt != "auto" or own.text != PromptForm.text:
        return runner.ask_in_form(resolved, stream, taken, handle)
    show_examples(handle, stream.examples())
    longest = list(forms(handle).values())[-1]
    use(handle, longest)
    notes.append(f"the run chooses the form of its prompts by asking the model; counted here in the longest one: {longest.name}")
    return ChosenForm(longest)
