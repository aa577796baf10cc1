"""The terminal plot of a schedule, and the orders that need the model."""

from __future__ import annotations

import io
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from testbed.core.events import KINDS, Ask, EditEvent
from testbed.experiment import runner
from testbed.experiment.config import RunConfig
from testbed.experiment.timeline_table import ROWS, WIDTH, timeline
from testbed.model.difficulty import losses
from testbed.model.encoding import answer_ids, prompt_inputs
from tests.helpers.models import build, folder

YEARS = st.lists(st.tuples(st.integers(1, 3000) | st.integers(1, 12), st.sampled_from(KINDS)), min_size=1, max_size=60)


def shown(events: list[EditEvent]) -> list[str]:
    console = Console(file=io.StringIO(), width=100)
    console.print(timeline(events, "dated"), markup=False, highlight=False)
    return console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]


@settings(max_examples=80, deadline=None)
@given(YEARS)
def test_every_edit_is_in_the_plot_once(drawn: list[tuple[int, str]]) -> None:
    drawn.sort()
    events = [
        EditEvent(kind, year + 0.5, i, f"q{i}", "t", revises=None if kind == "add" else "x", source=str(i))  # pyright: ignore
        for i, (year, kind) in enumerate(drawn)
    ]
    title, *rows, caption = shown(events)
    assert title.strip() == "Edits by year (dated)"
    assert len(rows) <= ROWS
    found = [re.match(r" *(\d+)(?:-(\d+))? +([\d,]+) *(.*)", row) for row in rows]
    counts = [int(m[3]) if m else -1 for m in found]
    assert sum(counts) == len(events)
    for m, n in zip(found, counts):
        assert m is not None
        first, last = int(m[1]), int(m[2] or m[1])
        assert n == sum(first <= year <= last for year, _ in drawn)
        assert len(m[4].strip()) == math.ceil(WIDTH * n / max(counts))
    assert all((kind in caption) == any(k == kind for _, k in drawn) for kind in KINDS)


def test_a_loss_is_the_mean_over_the_targets_tokens() -> None:
    handle = build("llama")
    events = [EditEvent("add", 1.0, i, f"who leads {x}?", t) for i, (x, t) in enumerate([("one", "Mara Venn"), ("the bridge", "green")])]
    found = losses(handle, events)
    for e in events:
        ids = answer_ids(handle, Ask(e.prompt), e.target)
        prompt = prompt_inputs(handle, Ask(e.prompt))["input_ids"]
        with torch.no_grad():
            logits = handle.model(torch.cat([prompt, torch.tensor([ids])], 1)).logits[0].double().log_softmax(-1)
        gold = [-logits[prompt.shape[1] - 1 + i, token].item() for i, token in enumerate(ids)]
        assert found[e.id] == pytest.approx(sum(gold) / len(gold), abs=1e-3)
    assert handle.cache["losses"] == found


def test_hardest_and_easiest_first_are_the_same_edits_the_other_way_round() -> None:
    def adds(order: str) -> list[EditEvent]:
        config = RunConfig("world-yearly", ("noop",), str(folder("llama")), edits=30, set=(f"stream.order={order}",), probe_budget=1)
        plan = runner.prepare(config)
        assert (order == "drawn") != any("in another order" in note for note in plan.manifest["notes"])
        assert [a.event for s in plan.schedule.steps for a in s.edits] == plan.events
        of = losses(plan.handle, plan.events)
        found = [e for e in plan.events if e.kind == "add"]
        assert order == "drawn" or [of[e.id] for e in found] == sorted((of[e.id] for e in found), reverse=order == "hardest")
        return found

    hardest, easiest, drawn = adds("hardest"), adds("easiest"), adds("drawn")
    assert {e.id for e in hardest} == {e.id for e in easiest} == {e.id for e in drawn}
    assert hardest[0].id == easiest[-1].id != drawn[0].id
