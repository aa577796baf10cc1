"""A dry run: the schedule of a run and an estimate of its cost. Nothing is written.

The schedule is exact. A few edits and questions are timed on the real model and scaled by the counts of the schedule;
costs that grow along a stream (the search of a codebook) do not show in so short a measurement.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from testbed.core.schema import EditReport
from testbed.editors.base import Editor
from testbed.experiment import runner
from testbed.experiment.answering import answer_base, ask_step
from testbed.experiment.config import ResolvedRun
from testbed.experiment.loop import Context, apply_step
from testbed.experiment.memory import peak_bytes
from testbed.experiment.runner import PreparedRun
from testbed.experiment.schedule import Schedule, ScheduledQuestion, Step

STEPS, EDITS, QUESTIONS = 4, 64, 64
"""The sample of each editor: at most so many steps (two at least) with so many edits, and so many questions of the panels."""
REPORT_SECONDS = (7.0, 2e-4)
"""Seconds of the report: once, and for each answer."""
DISK_BYTES = (1_500_000, 60)
"""Bytes on disk: report, figures and tables; and each stored answer."""


@dataclass(frozen=True)
class EditorCost:
    """Estimated seconds of one editor over the whole schedule, and bytes of its state at the end."""

    name: str
    prepare: float
    edits: float
    right_after: float
    panels: float
    state: float

    @property
    def seconds(self) -> float:
        return self.prepare + self.edits + self.right_after + self.panels


def print_estimate(resolved: ResolvedRun, console: Console) -> None:
    """Print the schedule and the cost of a run. Raises what `runner.prepare` raises."""
    run = runner.prepare(resolved)
    for table in (_facts(run), _questions(run.schedule)):
        console.print(table, markup=False, highlight=False)
    for note in run.manifest["notes"]:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    base, costs = measure(run)
    console.print(_costs(run, base, costs), markup=False, highlight=False)


def _facts(run: PreparedRun) -> Table:
    kinds = Counter(e.kind for e in run.events)
    span = f"year {run.events[0].year} to {run.events[-1].year}"
    rows = {
        "stream": run.config.stream,
        "origin": run.stream.origin,
        "time axis": run.stream.time_axis,
        "model": f"{run.handle.name} on {run.handle.device}, {run.manifest['dtype']}",
        "edits": f"{len(run.events):,} ({', '.join(f'{n:,} {k}' for k, n in sorted(kinds.items()))}), {span}",
        "years, steps": f"{run.manifest['years']:,}, {len(run.schedule.steps):,}",
        "questions": f"{run.schedule.n_questions:,} of each editor, {len(run.schedule.unique_questions):,} different ones",
        "panel scale": f"{100 * run.schedule.scale:.3g} %",
        "skipped records": f"{len(run.stream.skipped):,}",
        "run folder": str(run.out),
    }
    return _table("What would run", [], rows.items())


def _questions(schedule: Schedule) -> Table:
    """Questions of one editor by probe and split."""
    counts = Counter((q.probe, q.plan.question.split) for s in schedule.steps for q in s.questions)
    rows = [(probe, split, f"{n:,}") for (probe, split), n in sorted(counts.items())]
    return _table("Questions", ["probe", "split", "number"], rows)


def measure(run: PreparedRun) -> tuple[float, list[EditorCost]]:
    """Seconds for the answers of the unedited model, and the cost of every editor, scaled from small samples."""
    panels = [q for s in run.schedule.steps for q in s.questions if q.plan.panel != "immediate"]
    sample = panels[:: max(1, len(panels) // QUESTIONS)][:QUESTIONS]
    steps = run.schedule.steps[: max(2, min(STEPS, EDITS // run.config.batch))]
    asked = [*sample, *(q for s in steps for q in _right_after(s).questions)]
    questions = list({q.plan.question.id: q.plan.question for q in asked}.values())
    answer_base(run.handle, questions[:4], run.max_new_tokens)  # warm up
    start = time.perf_counter()
    answers = answer_base(run.handle, questions, run.max_new_tokens)
    each = (time.perf_counter() - start) / max(1, len(questions))
    context = run.context({a.question_id: a for a in answers})
    costs = [_editor_cost(run, context, name, steps, (sample, len(panels))) for name in run.config.editor]
    return each * len(run.schedule.unique_questions), costs


def _editor_cost(
    run: PreparedRun, context: Context, name: str, steps: Sequence[Step], panels: tuple[Sequence[ScheduledQuestion], int]
) -> EditorCost:
    """panels: a sample of the questions of the panels, and their number."""
    editor = run.resolved.editors[name].create()
    start = time.perf_counter()
    editor.prepare(run.handle, run.stream.train_pool())
    prepared = time.perf_counter() - start
    reports: list[EditReport] = []
    asking: list[float] = []
    for step in steps:
        reports.append(apply_step(context, editor, step))
        asking.append(_seconds_of_questions(context, editor, _right_after(step)))
    sample, n_panels = panels
    of_sample = _seconds_of_questions(context, editor, replace(steps[0], questions=tuple(sample)))
    n, sizes = len(run.schedule.steps), [r.state_bytes for r in reports]
    growth = (sizes[-1] - sizes[0]) / max(1, len(sizes) - 1)
    return EditorCost(
        name,
        prepared,
        n * _warm([r.seconds for r in reports]),
        n * _warm(asking),
        n_panels * of_sample / max(1, len(sample)),
        sizes[-1] + growth * (n - len(sizes)),
    )


def _seconds_of_questions(context: Context, editor: Editor, step: Step) -> float:
    start = time.perf_counter()
    ask_step(context, editor, step)
    return time.perf_counter() - start


def _right_after(step: Step) -> Step:
    """The step with those questions only that are asked right after it."""
    return replace(step, questions=tuple(q for q in step.questions if q.plan.panel == "immediate"))


def _warm(seconds: Sequence[float]) -> float:
    """Mean without the first value, which includes one-time costs."""
    rest = seconds[1:] or seconds
    return sum(rest) / max(1, len(rest))


def _costs(run: PreparedRun, base: float, costs: Sequence[EditorCost]) -> Table:
    answers = run.schedule.n_questions * len(costs)
    report, state = REPORT_SECONDS[0] + REPORT_SECONDS[1] * answers, sum(c.state for c in costs)
    rows: list[Sequence[str]] = [("unedited model", "", "", "", "", _time(base), "")]
    for c in costs:
        rows.append((c.name, *map(_time, (c.prepare, c.edits, c.right_after, c.panels, c.seconds)), decimal(round(c.state))))
    rows.append(("report", "", "", "", "", _time(report), ""))
    rows.append(("all", "", "", "", "", _time(base + report + sum(c.seconds for c in costs)), decimal(round(state))))
    memory = decimal(round(peak_bytes(run.handle.device) + max((c.state for c in costs), default=0.0)))
    disk = decimal(round(DISK_BYTES[0] + DISK_BYTES[1] * answers + state))
    table = _table("What it would cost", ["", "prepare", "edits", "right after", "panels", "time", "state at the end"], rows)
    table.caption = f"peak memory about {memory}, disk about {disk}; times within about a factor of two"
    return table


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left", box=None, show_header=bool(columns))
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < 1 or name == "split" else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
