"""What a run would do and cost, before it is started. Nothing is written.

The schedule is exact. Time is measured on the real model with a few edits and questions, then scaled by the
schedule's counts; costs that grow along a stream (a codebook's search) are not seen by so short a look.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from testbed.core.events import Question
from testbed.core.schema import EditReport
from testbed.experiment import runner
from testbed.experiment.config import RunConfig
from testbed.experiment.loop import Context, answer_base, apply_step, ask_step, peak_bytes
from testbed.experiment.runner import Plan
from testbed.experiment.schedule import Asked, Schedule, Step
from testbed.experiment.timeline_table import timeline

STEPS, EDITS, QUESTIONS = 4, 64, 64
"""Steps that each editor makes, two at least but no more than hold so many edits, and questions of the panels that it
is asked, to measure it."""
REPORT_SECONDS = (7.0, 2e-4)
"""Figures and tables of a run: once, and for each answer."""
DISK_BYTES = (1_500_000, 60)
"""Report, figures and tables; one answer as it is stored."""


@dataclass(frozen=True)
class Cost:
    """Seconds of one editor over the whole schedule, and bytes of its state at the end."""

    name: str
    prepare: float
    edits: float
    right_after: float
    panels: float
    state: float

    @property
    def seconds(self) -> float:
        return self.prepare + self.edits + self.right_after + self.panels


def print_estimate(config: RunConfig, console: Console) -> None:
    """Print what would run and what it would cost. Raises what `runner.prepare` raises."""
    plan = runner.prepare(config)
    for table in (_facts(plan), timeline(plan.events, plan.stream.time_axis), _questions(plan.schedule)):
        console.print(table, markup=False, highlight=False)
    for note in plan.manifest["notes"]:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    base, costs = measure(plan)
    console.print(_costs(plan, base, costs), markup=False, highlight=False)


def _facts(plan: Plan) -> Table:
    kinds = Counter(e.kind for e in plan.events)
    skipped = len(plan.stream.skipped)
    rows = {
        "stream": plan.config.stream,
        "origin": plan.stream.origin,
        "time axis": plan.stream.time_axis,
        "model": f"{plan.handle.name} on {plan.handle.device}, {plan.manifest['dtype']}",
        "edits": f"{len(plan.events):,} ({', '.join(f'{n:,} {k}' for k, n in sorted(kinds.items()))})",
        "years, steps": f"{plan.manifest['years']:,}, {len(plan.schedule.steps):,}",
        "questions": f"{plan.schedule.n_questions:,} of each editor, {len(plan.schedule.unique_questions):,} different ones",
        "panel scale": f"{100 * plan.schedule.scale:.3g} %",
        "skipped records": f"{skipped:,}",
        "run folder": str(plan.out),
    }
    return _table("What would run", [], rows.items())


def _questions(schedule: Schedule) -> Table:
    """Questions of one editor by probe and split."""
    counts = Counter((a.probe, a.plan.question.split) for s in schedule.steps for a in s.asked)
    rows = [(probe, split, f"{n:,}") for (probe, split), n in sorted(counts.items())]
    return _table("Questions", ["probe", "split", "number"], rows)


def measure(plan: Plan) -> tuple[float, list[Cost]]:
    """Seconds for the unedited model's answers, and the cost of every editor, from a small sample of both."""
    sample, steps = _sample(plan.schedule), _steps(plan)
    questions = _unique([*sample, *(a for s in steps for a in _now(s).asked)])
    answer_base(plan.handle, questions[:4], plan.config.max_new_tokens)
    start = time.perf_counter()
    answers = answer_base(plan.handle, questions, plan.config.max_new_tokens)
    each = (time.perf_counter() - start) / max(1, len(questions))
    known = {a.question_id: a for a in answers}
    context = Context(plan.manifest["run"], plan.config.seed, plan.handle, plan.stream, plan.schedule, known, plan.config.max_new_tokens)
    costs = [_measure_editor(plan, context, name, sample) for name in plan.config.editor]
    return each * len(plan.schedule.unique_questions), costs


def _measure_editor(plan: Plan, context: Context, name: str, sample: Sequence[Asked]) -> Cost:
    editor = runner.make_editor(plan.config, name)
    start = time.perf_counter()
    editor.prepare(plan.handle, plan.stream.train_pool())
    prepared = time.perf_counter() - start
    reports: list[EditReport] = []
    asking: list[float] = []
    for step in _steps(plan):
        reports.append(apply_step(context, editor, step))
        asking.append(_ask(context, editor, _now(step)))
    panels = _ask(context, editor, replace(plan.schedule.steps[0], asked=tuple(sample)))
    n = len(plan.schedule.steps)
    asked = sum(a.plan.panel != "immediate" for s in plan.schedule.steps for a in s.asked)
    return Cost(
        name,
        prepared,
        n * _warm([r.seconds for r in reports]),
        n * _warm(asking),
        asked * panels / max(1, len(sample)),
        _grown([r.state_bytes for r in reports], n),
    )


def _ask(context: Context, editor: Any, step: Step) -> float:
    start = time.perf_counter()
    ask_step(context, editor, step)
    return time.perf_counter() - start


def _now(step: Step) -> Step:
    """A step with nothing but what is asked right after it."""
    return replace(step, asked=tuple(a for a in step.asked if a.plan.panel == "immediate"))


def _steps(plan: Plan) -> tuple[Step, ...]:
    """The first steps, which every editor makes."""
    return tuple(plan.schedule.steps[: max(2, min(STEPS, EDITS // plan.config.batch))])


def _sample(schedule: Schedule) -> list[Asked]:
    """Questions of the panels, evenly spaced over the schedule, in its mix of splits."""
    asked = [a for s in schedule.steps for a in s.asked if a.plan.panel != "immediate"]
    return asked[:: max(1, len(asked) // QUESTIONS)][:QUESTIONS]


def _unique(asked: Iterable[Asked]) -> list[Question]:
    return list({a.plan.question.id: a.plan.question for a in asked}.values())


def _warm(seconds: Sequence[float]) -> float:
    """Mean without the first, which pays for what is done once."""
    rest = seconds[1:] or seconds
    return sum(rest) / max(1, len(rest))


def _grown(sizes: Sequence[int], n: int) -> float:
    """Bytes after n steps, by the growth between the first and the last that were seen."""
    growth = (sizes[-1] - sizes[0]) / max(1, len(sizes) - 1)
    return sizes[-1] + growth * (n - len(sizes))


def _costs(plan: Plan, base: float, costs: Sequence[Cost]) -> Table:
    answers = plan.schedule.n_questions * len(costs)
    report = REPORT_SECONDS[0] + REPORT_SECONDS[1] * answers
    rows: list[Sequence[str]] = [("unedited model", "", "", "", "", _time(base), "")]
    for c in costs:
        rows.append((c.name, *map(_time, (c.prepare, c.edits, c.right_after, c.panels, c.seconds)), _size(c.state)))
    rows.append(("report", "", "", "", "", _time(report), ""))
    total = base + report + sum(c.seconds for c in costs)
    rows.append(("all", "", "", "", "", _time(total), _size(sum(c.state for c in costs))))
    memory = peak_bytes(plan.handle.device) + max((c.state for c in costs), default=0.0)
    disk = DISK_BYTES[0] + DISK_BYTES[1] * answers + sum(c.state for c in costs)
    table = _table("What it would cost", ["", "prepare", "edits", "right after", "panels", "time", "state at the end"], rows)
    table.caption = f"peak memory about {_size(memory)}, disk about {_size(disk)}; times within about a factor of two"
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


def _size(n: float) -> str:
    """Bytes with a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
