"""A dry run: the schedule of a run and an estimate of its cost, by arithmetic. Nothing is written and no edit is made.

What an editor does is counted (`testbed.editors.work`), one piece of each kind of work is timed on the model
(`testbed.experiment.unit_times`), and both are multiplied by the counts of the schedule (`testbed.experiment.outline`).
Costs that grow along a stream, as the search of a codebook, do not show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from testbed.core.events import Question
from testbed.editors.base import Editor
from testbed.editors.work import TrainingBefore, Work
from testbed.experiment.config import ResolvedRun
from testbed.experiment.manifest import notes_of
from testbed.experiment.memory import peak_bytes
from testbed.experiment.outline import Kind, Outline, outline
from testbed.experiment.side_by_side import workers
from testbed.experiment.unit_times import UnitTimes
from testbed.monitors.base import PROMPTS

SECONDS, TOGETHER = 1.0, 32
"""About the seconds of all timed questions, and questions of a panel that are asked together."""
BEFORE = 320
"""Questions that a run asks before its first edit, to choose a prompt form and to learn what the model believes."""
REPORT_SECONDS = (7.0, 2e-4)
"""Seconds of the report: once, and for each answer."""
DISK_BYTES = (1_500_000, 60)
"""Bytes on disk: report, figures and tables; and each stored answer."""
COLUMNS: tuple[str, ...] = ("right after", "panels", "benchmarks")
"""Columns of a kind's questions, in their order."""


@dataclass(frozen=True)
class EditorCost:
    """Estimated seconds of one editor over the whole schedule, and bytes of its state at the end. questions: by column.

    note: what a reader must know of its training before the first edit; "" for a method without one.
    """

    name: str
    prepare: float
    edits: float
    questions: Mapping[str, float]
    state: float
    note: str = ""

    @property
    def seconds(self) -> float:
        return self.prepare + self.edits + sum(self.questions.values())


def print_estimate(resolved: ResolvedRun, console: Console) -> None:
    """Print the schedule and the cost of a run. Raises what `outline` raises."""
    plan = outline(resolved)
    for table in (_facts(plan), _questions(plan)):
        console.print(table, markup=False, highlight=False)
    for note in [*plan.notes, *notes_of(plan.run)]:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    base, costs = measure(plan)
    for note in filter(None, (c.note for c in costs)):
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print(_costs(plan, base, costs), markup=False, highlight=False)


def _facts(plan: Outline) -> Table:
    run, config = plan.run, plan.run.config
    kinds = Counter(e.kind for e in run.events)
    span = f"year {run.events[0].year} to {run.events[-1].year}" if plan.exact else f"from year {run.events[0].year} on"
    rows = {
        "stream": config.stream,
        "origin": run.stream.origin,
        "time axis": run.stream.time_axis,
        "model": f"{run.handle.name} on {run.handle.device}, {str(run.handle.dtype).removeprefix('torch.')}",
        "edits": f"{plan.edits:,} ({', '.join(f'{plan.count(n)} {k}' for k, n in sorted(kinds.items()))}), {span}",
        "years, steps": f"{plan.count(len({e.year for e in run.events}))}, {plan.count(len(run.schedule.steps))}",
        "questions": f"{plan.count(run.schedule.n_questions)} of each editor, "
        f"{plan.count(len(run.schedule.unique_questions))} different ones",
        "panel scale": f"{100 * run.schedule.scale:.3g} %",
        "skipped records": f"{len(run.stream.skipped):,}",
        "run folder": str(config.resume or config.out or f"under runs/, named {config.stream}-{config.seed}-HASH when it begins"),
    }
    return _table("What would run", [], rows.items())


def _questions(plan: Outline) -> Table:
    """Questions of one editor by probe and split."""
    counts = Counter((q.probe, q.plan.question.split) for s in plan.schedule.steps for q in s.questions)
    rows = [(probe, split, plan.count(n)) for (probe, split), n in sorted(counts.items())]
    return _table("Questions", ["probe", "split", "number"], rows)


def measure(plan: Outline) -> tuple[float, list[EditorCost]]:
    """Seconds for the answers of the unedited model with all that is asked before the first edit, and the cost of every editor."""
    units = UnitTimes(plan.run.handle, plan.run.events)
    each = _seconds_of_questions(plan, units)
    base = plan.times * sum(each[kind] * len(questions) for kind, questions in plan.unique.items())
    before = BEFORE * max((s for (column, _), s in each.items() if column != "benchmarks"), default=0.0)
    return base + before, [_editor_cost(plan, units, each, name) for name in plan.run.config.editor]


def _seconds_of_questions(plan: Outline, units: UnitTimes) -> dict[Kind, float]:
    """Seconds of a question of each kind, asked of the unedited model in groups as large as the run's.

    Questions that are answered in one way are timed together, those of benchmarks apart from the stream's.
    """
    alike: dict[Kind, list[Question]] = {}
    for kind, questions in plan.kinds.items():
        alike.setdefault((kind[0] if kind[0] == "benchmarks" else "", kind[1]), []).extend(q.plan.question for q in questions)
    lines = {kind: units.questions(asked, plan.run.max_new_tokens, SECONDS / len(alike)) for kind, asked in alike.items()}
    out: dict[Kind, float] = {}
    for kind, questions in plan.kinds.items():
        n = min(len(questions), max(1, round(len(questions) / len(plan.schedule.steps))) if kind[0] == "right after" else TOGETHER)
        out[kind] = lines[kind[0] if kind[0] == "benchmarks" else "", kind[1]](n) / n
    return out


def _editor_cost(plan: Outline, units: UnitTimes, each: Mapping[Kind, float], name: str) -> EditorCost:
    run = plan.run
    editor = run.resolved.editors[name].create()
    editor.bind(run.handle)
    work = editor.work(run.config.batch)
    steps = len(run.schedule.steps)
    batch = len(run.events) / steps
    monitors = sum("power" in s.checkpoint.reasons or s.checkpoint.full for s in run.schedule.steps) * units.forward(PROMPTS)
    questions: dict[str, float] = dict.fromkeys(COLUMNS, 0.0)
    for kind, n in _asked(plan, editor).items():
        longer = work.facts * units.fact_tokens * units.token
        questions[kind[0]] += plan.times * n * (work.asked * each[kind] + longer)
    questions["panels"] += plan.times * monitors if work.asked else 0.0
    training, note = _training_before(plan, units, editor, work.before) if work.before else (0.0, "")
    layers = run.handle.n_layers
    return EditorCost(
        name,
        work.text_tokens * units.token + sum(map(units.eigen, work.eigen)) + units.forward(1) / layers + training,
        plan.times * steps * seconds_of_batch(work, units, batch),
        questions,
        4 * (work.state + work.state_per_edit * plan.edits),
        note,
    )


def _training_before(plan: Outline, units: UnitTimes, editor: Editor, before: TrainingBefore) -> tuple[float, str]:
    """Seconds of a training before the first edit, at most, and a note on it; no seconds where a finished one is cached."""
    if before.is_cached(plan.run.stream.train_pool()):
        return 0.0, f"{editor.name}: its training before the first edit is cached and costs nothing"
    each = units.forward(before.rows) + units.step(before.rows, before.layers) + before.trained * units.number
    seconds, budget = before.steps * each, f"its budget of {_time(before.seconds)} of CPU time"
    ends = f"{before.steps:,.0f} steps" if seconds < before.seconds else f"{budget}, in which {before.steps:,.0f} steps do not fit"
    kept = "; --cache FOLDER keeps it for later runs" if plan.run.handle.cache_folder is None else "; later runs take it from the cache"
    return min(seconds, before.seconds), f"{editor.name}: counted with a training before the first edit of {ends}; it may end sooner{kept}"


def _asked(plan: Outline, editor: Editor) -> dict[Kind, int]:
    """Questions by kind that the model answers; one that is told the truth answers those about no edit alone."""
    told = editor.traits.told_truth and editor.traits.learns == "no"
    return {kind: plan.untold[kind] if told else len(questions) for kind, questions in plan.kinds.items()}


def seconds_of_batch(work: Work, units: UnitTimes, batch: float) -> float:
    """Seconds of the edits of one step, of which there are `batch` on average."""
    numbers = work.trained + work.trained_per_edit * batch
    training = work.steps * (units.step(work.rows * batch, work.layers) + numbers * units.number) if work.steps else 0.0
    reading = units.forward(work.forwards * batch) if work.forwards else 0.0
    return reading + training + sum(map(units.solve, work.solves))


def _costs(plan: Outline, base: float, costs: Sequence[EditorCost]) -> Table:
    answers = plan.times * plan.schedule.n_questions * len(costs)
    report, state = REPORT_SECONDS[0] + REPORT_SECONDS[1] * answers, sum(c.state for c in costs)
    shown = [c for c in COLUMNS if any(kind[0] == c for kind in plan.kinds)]
    blank = [""] * (2 + len(shown))
    rows: list[Sequence[str]] = [("unedited model", *blank, _time(base), "")]
    for c in costs:
        by_column = [c.questions[column] for column in shown]
        rows.append((c.name, *map(_time, (c.prepare, c.edits, *by_column, c.seconds)), decimal(round(c.state))))
    rows.append(("report", *blank, _time(report), ""))
    jobs, _ = workers(plan.run.config.jobs, len(costs), plan.run.handle)
    seconds = base + report + seconds_together([c.seconds for c in costs], jobs)
    rows.append(("all" if jobs == 1 else f"all, {jobs} at a time", *blank, _time(seconds), decimal(round(state))))
    memory = decimal(round(peak_bytes(plan.run.handle.device) + max((c.state for c in costs), default=0.0)))
    disk = decimal(round(DISK_BYTES[0] + DISK_BYTES[1] * answers + state))
    table = _table("What it would cost", ["", "prepare", "edits", *shown, "time", "state at the end"], rows)
    table.caption = f"peak memory about {memory}, disk about {disk}; times are rough: edits within a factor of three, questions of five"
    return table


def seconds_together(each: Sequence[float], jobs: int) -> float:
    """Seconds of editors of which `jobs` run at a time: their share of all, and no less than the longest takes."""
    return max(sum(each) / jobs, max(each, default=0.0))


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
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:,.0f} days"
