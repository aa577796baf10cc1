"""What an edit and a question cost an editor late in a stream against early, in turn, so that a restless machine troubles both alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median

from testbed.bench.editors import seconds_of, stages_of
from testbed.core.events import EditBatch
from testbed.core.schema import EditReport
from testbed.core.timing import collect_seconds
from testbed.editors.base import Editor
from testbed.experiment.rebuild import StoredRun, rebuild
from testbed.storage.files import StoreError

_TURNS = 3
"""How often both are asked the same questions."""


@dataclass(frozen=True)
class Late:
    """One editor after two numbers of edits: each makes the same next edits and answers the same questions.

    Milliseconds are CPU time on a CPU, else wall time, of one edit or question; medians over steps, or over turns of questions.
    """

    editor: str
    early: int
    late: int
    edit_early: float | None
    edit_late: float | None
    edit_stages: str
    """Wall milliseconds of a late edit by stage, the dearest first, and how many times the early ones."""
    question_early: float | None
    question_late: float | None
    question_stages: str
    """The same of a question. Answers differ: one that is no longer given is generated to its own end, and scored in a pass of its own."""

    @property
    def edit_times(self) -> float | None:
        return self.edit_late / self.edit_early if self.edit_late and self.edit_early else None

    @property
    def question_times(self) -> float | None:
        return self.question_late / self.question_early if self.question_late and self.question_early else None


def lates(run: Path, first: int, edits: int, questions: int) -> Iterator[Late]:
    """A line an editor of a run folder, as it is after about `first` edits and after all.

    Raises `StoreError` where the folder is no run, holds no state, or has no more than `first` edits.
    """
    stored = rebuild(run)
    made = list(accumulate(len(s.edits) for s in stored.run.schedule.steps))
    step = next((n for n, m in enumerate(made, 1) if m >= first), len(made))
    if step == len(made):
        raise StoreError(f"{run} has {made[-1] if made else 0} edits, not more than {first}: choose a smaller --at, or a longer run")
    for name in stored.run.config.editor:
        pair = stored.at(name, step), stored.newest(name)[1]
        costs = _edit(stored, pair, edits)
        asked = _ask(stored, pair, made[step - 1], questions)
        yield Late(name, made[step - 1], made[-1], *_told(*costs), *_told(*asked))


Costs = list[tuple[float, dict[str, float]]]
"""Of each step or turn, seconds of one edit or question, in all and by stage."""


def _edit(stored: StoredRun, pair: tuple[Editor, Editor], edits: int) -> tuple[Costs, Costs]:
    """The next edits of the stream, made by both in turn, and which of them goes first in turn too."""
    plan = stored.run
    out: tuple[Costs, Costs] = [], []
    size, events = plan.config.batch, plan.stream.events(plan.config.edits + edits)[plan.config.edits :]
    if not events:
        raise StoreError(f"the stream has no edits beyond the {plan.config.edits} of the run: measure on a shorter one")
    for n, at in enumerate(range(0, len(events), size)):
        part = tuple(e for e in events[at : at + size] if e.kind != "retire")
        batch = EditBatch(part, stored.n_steps + n + 1, {e.id: plan.stream.paraphrases(e) for e in part})
        for i in (0, 1) if n % 2 else (1, 0):
            reports: list[EditReport] = []
            spent = seconds_of(plan.handle, lambda i=i, b=batch, got=reports: got.append(pair[i].apply(b)))
            out[i].append(_each(spent, stages_of(reports[0]), len(part)))
    return out


def _ask(stored: StoredRun, pair: tuple[Editor, Editor], upto: int, questions: int) -> tuple[Costs, Costs]:
    """Questions about the edits that both have made, asked once before for what is found out once."""
    plan = stored.run
    events = plan.stream.events(plan.config.edits)[max(0, upto - questions) : upto]
    found = [q for e in events for q in plan.stream.questions(e) if q.image is None or plan.handle.reads_pictures][:questions]
    asks, answers = [q.ask() for q in found], [q.answer for q in found]
    out: tuple[Costs, Costs] = [], []
    for turn in range(_TURNS + 1 if found else 0):
        for editor, costs in zip(pair, out):
            predictor = editor.predictor()
            with collect_seconds() as stages:
                spent = seconds_of(plan.handle, lambda p=predictor: p.respond(asks, answers, plan.config.max_new_tokens))
            costs.extend([_each(spent, stages, len(asks))] if turn else [])
    return out


def _each(seconds: float, stages: Mapping[str, float], n: int) -> tuple[float, dict[str, float]]:
    return seconds / max(1, n), {k: v / max(1, n) for k, v in stages.items()}


def _told(early: Costs, late: Costs) -> tuple[float | None, float | None, str]:
    """Milliseconds early and late, medians, and the late ones by stage."""
    one, other = (1000 * median(seconds for seconds, _ in x) if x else None for x in (early, late))
    return one, other, _stages(early, late)


def _stages(early: Costs, late: Costs) -> str:
    names = dict.fromkeys(k for _, stages in late for k in stages)
    one, other = ({k: 1000 * median(s.get(k, 0.0) for _, s in x) for k in names} for x in (early, late))
    return ", ".join(f"{k} {other[k]:.1f} ({other[k] / one[k]:.2f} times)" for k in sorted(names, key=lambda k: -other[k]) if one[k])
