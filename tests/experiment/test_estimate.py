"""The dry run: counted work beside the work of real edits, counts of a long schedule beside those of a built one, and its time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from streams.base import StreamConfig
from testbed.core.events import EditBatch
from testbed.core.registry import EDITORS, STREAMS
from testbed.editors.work import Work
from testbed.experiment import estimate, schedule, unit_times
from testbed.experiment.config import RunConfig
from testbed.experiment.outline import Outline, outline
from testbed.experiment.unit_times import UnitTimes
from testbed.model.encoding import answer_ids, collate
from testbed.model.handle import ModelHandle
from testbed.model.loading import load

EDITS = 4


@contextmanager
def counted_layers(handle: ModelHandle) -> Iterator[dict[str, int]]:
    """Inside, positions that decoder layers run are counted: in training steps, and in forwards without a gradient."""
    seen = {"trained": 0, "read": 0}

    def count(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen["trained" if hidden.requires_grad else "read"] += hidden.shape[0] * hidden.shape[1]

    with ExitStack() as stack:
        for layer in handle.layers:
            stack.callback(layer.register_forward_hook(count, with_kwargs=True).remove)
        yield seen


def edits_of(handle: ModelHandle, name: str, steps: int, batch: int) -> tuple[Work, dict[str, int], int]:
    """The counted work of a batch, the positions that its layers really ran, and the positions of its rows."""
    stream = STREAMS.get("world-yearly")(StreamConfig())
    cls = EDITORS.get(name)
    editor = cls(cls.Config(steps=steps))
    editor.prepare(handle, stream.train_pool())
    events = [e for e in stream.events(40) if e.kind == "add"][: 2 * batch]
    first, second = (
        EditBatch(tuple(part), n, {e.id: stream.paraphrases(e) for e in part}) for n, part in ((1, events[:batch]), (2, events[batch:]))
    )
    editor.apply(first)  # one-time checks and statistics
    editor._first = None  # pyright: ignore[reportPrivateUsage]
    with counted_layers(handle) as seen:
        report = editor.apply(second)
    assert not report.failed, report.failed
    asks = [e.ask() for e in second.events]
    rows = collate(handle, asks, [answer_ids(handle, a, e.target) for a, e in zip(asks, second.events)], end=True)
    return editor.work(batch), seen, int((rows.prompt | rows.answer).sum())


@pytest.mark.parametrize("name", ["elder", "lora", "memit", "alphaedit", "rome", "grace"])
def test_the_training_that_is_counted_is_about_the_training_that_is_done(name: str) -> None:
    handle, steps = load("tiny"), 12
    work, seen, positions = edits_of(handle, name, steps, 1 if name == "rome" else EDITS)
    counted = work.steps * work.rows * work.layers * positions
    assert work.steps == steps
    assert seen["trained"] / 4 <= counted <= 4 * max(1, seen["trained"]), (counted, seen)


@pytest.mark.parametrize("name", ["finetune", "balancedit", "wise"])
def test_an_editor_of_the_last_layer_trains_no_whole_layer(name: str) -> None:
    handle = load("tiny")
    work, seen, _ = edits_of(handle, name, 3, EDITS)
    assert work.layers < 1
    assert seen["trained"] == 0
    assert work.trained + work.trained_per_edit == handle.parameter(handle.down_weight(-1)).numel()


def test_every_editor_counts_its_work() -> None:
    handle = load("tiny")
    for name in EDITORS.names():
        cls = EDITORS.get(name)
        if cls.Config().problems():
            continue  # a package that it needs is not installed
        editor = cls(cls.Config())
        editor.bind(handle)
        work = editor.work(1)
        assert work.steps > 0 or cls.traits.learns != "training", name
        assert (work.asked > 0) or cls.traits.learns == "no", name


@pytest.mark.ci
def test_a_long_schedule_is_counted_as_it_would_be_built() -> None:
    resolved = RunConfig(stream="world-yearly", edits=2000, editor=("noop",)).resolve()
    plan = outline(resolved)
    assert not plan.exact
    assert plan.edits == 2000
    stream = resolved.stream.create()
    built = schedule.build(stream, stream.events(2000), schedule.ScheduleConfig())
    assert plan.times * plan.schedule.n_questions == pytest.approx(built.n_questions, rel=0.2)
    assert plan.times * len(plan.schedule.unique_questions) == pytest.approx(len(built.unique_questions), rel=0.5)
    assert plan.times * len(plan.schedule.steps) == pytest.approx(len(built.steps), rel=0.05)


def test_a_hundred_million_edits_are_extrapolated_and_said_to_be() -> None:
    out = StringIO()
    start = time.perf_counter()
    estimate.print_estimate(
        RunConfig(stream="world-yearly", edits=100_000_000, editor=("noop", "finetune", "lora", "scr")).resolve(),
        Console(file=out, width=200),
    )
    assert time.perf_counter() - start < 60  # six times the ten seconds it may take, for a busy machine
    text = out.getvalue()
    assert "the schedule of the first 500 edits is exact, and numbers with ~ are extrapolated from it to 100,000,000" in text
    assert "~100,000,000" in text


def test_the_stream_that_ends_is_counted_to_its_end() -> None:
    plan = outline(RunConfig(stream="countries-yearly", edits=100_000_000, editor=("noop",)).resolve())
    assert plan.edits == len(plan.run.stream.events(20_000)) < 20_000
    assert any("were asked for" in note for note in plan.notes)


def test_seconds_grow_with_every_count() -> None:
    handle = load("tiny")
    stream = STREAMS.get("world-yearly")(StreamConfig())
    units = UnitTimes(handle, stream.events(8))
    less = Work(steps=2, layers=1, trained=1e5, solves=(64,))
    more = Work(steps=20, layers=1, trained=1e7, solves=(640,))
    assert 0 < estimate.seconds_of_batch(less, units, 1) < estimate.seconds_of_batch(more, units, 1)
    assert units.step(8, 2) >= units.step(1, 2) > 0
    assert units.eigen(100) > units.solve(100) > 0
    assert torch.isfinite(torch.tensor([units.token, units.number, units.forward(3), units.fact_tokens])).all()


def test_long_answers_are_counted_at_their_length_and_timed_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a group of n questions takes n (1 + tokens) seconds, one of 200 tokens is counted with 201, though 16 are timed at most."""
    handle = load("tiny")
    stream = STREAMS.get("world-yearly")(StreamConfig())
    units, timed = UnitTimes(handle, stream.events(8)), list[tuple[int, int]]()
    monkeypatch.setattr(unit_times, "answer_base", lambda handle, part, tokens: timed.append((len(part), tokens)))

    def seconds(work: Callable[[], object]) -> float:
        work()
        n, tokens = timed[-1]
        return n * (1.0 + tokens)

    monkeypatch.setattr(units, "_once", seconds)
    asked = stream.questions(stream.events(1)[0])[:1] * 64
    assert units.questions(asked, 200, 1e4)(30) == pytest.approx(30 * 201)
    assert {tokens for _, tokens in timed} == {1, 16}
    assert units.questions(asked, 8, 1e4)(30) == pytest.approx(30 * 9)


@pytest.mark.parametrize(("jobs", "seconds"), [(1, 60.0), (2, 40.0), (3, 40.0)])
def test_editors_side_by_side_take_their_share_of_the_time_and_no_less_than_the_longest(jobs: int, seconds: float) -> None:
    assert estimate.seconds_together([10.0, 40.0, 10.0], jobs) == seconds
    assert estimate.seconds_together([], jobs) == 0.0


def outline_of_trained(out: Path, *settings: str) -> Outline:
    """The outline of a short run of both methods that are trained before the first edit, with the same settings."""
    both = ("mend.normalise_over=40", *(f"{name}.{setting}" for name in ("mend", "serac") for setting in settings))
    return outline(RunConfig(stream="world-yearly", edits=4, editor=("mend", "serac"), cache=out, probe_budget=50, set=both).resolve())


def test_a_training_before_the_first_edit_is_counted_until_it_is_cached(tmp_path: Path) -> None:
    plan = outline_of_trained(tmp_path, "train_steps=4", "judge_every=4", "held_out=0.01")
    _, counted = estimate.measure(plan)
    assert all(c.note.startswith(f"{c.name}: counted with a training before the first edit of 4 steps; it may end sooner") for c in counted)
    for resolved in plan.run.resolved.editors.values():
        resolved.create().prepare(plan.run.handle, plan.run.stream.train_pool())
    plan.run.handle.cache.pop("meta-training")  # so that the files alone tell
    _, cached = estimate.measure(plan)
    assert [c.note for c in cached] == [f"{c.name}: its training before the first edit is cached and costs nothing" for c in cached]
    assert all(later.prepare < before.prepare for before, later in zip(counted, cached))


def test_a_training_before_the_first_edit_costs_no_more_than_its_budget(tmp_path: Path) -> None:
    _, costs = estimate.measure(outline_of_trained(tmp_path, "train_steps=1000000", "cpu_minutes=0.5"))
    for c in costs:
        assert 30 <= c.prepare < 32
        assert "of its budget of 30 s of CPU time, in which 1,000,000 steps do not fit; it may end sooner" in c.note
