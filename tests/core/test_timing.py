"""Seconds by section: which section counts, for which collector, and nothing without a collector."""

from __future__ import annotations

import time
from contextlib import nullcontext

import pytest

from testbed.core.events import Ask, EditBatch
from testbed.core.registry import EDITORS
from testbed.core.timing import collect_seconds, timed
from testbed.editors.base import Editor
from testbed.model.predictor import ModelPredictor
from tests.helpers.models import build
from tests.helpers.plain_stream import plain as plain_stream

TRAINED = [n for n in EDITORS.names() if n in ("finetune", "finetune-l", "balancedit", "balancedit-plus", "grace", "wise", "elder", "lora")]
LOCATED = [n for n in EDITORS.names() if n in ("rome", "memit", "alphaedit", "pmet", "emmet")]


@timed("slow")
def slow(seconds: float) -> float:
    time.sleep(seconds)
    with timed("inner"):
        time.sleep(seconds)
    return seconds


def test_a_section_counts_for_what_it_calls() -> None:
    with collect_seconds() as seconds:
        assert slow(0.01) == 0.01
        with timed("inner"):
            slow(0.01)
    assert set(seconds) == {"slow", "inner"}
    assert min(seconds.values()) >= 0.02


def fail_in_the_second() -> None:
    with timed("first") as switch:
        switch("second")
        raise ValueError("no")


def test_a_section_may_turn_into_another_and_ends_when_its_work_fails() -> None:
    with collect_seconds() as seconds, pytest.raises(ValueError, match="no"):
        fail_in_the_second()
    assert list(seconds) == ["first", "second"]


def test_nothing_is_kept_without_a_collector_and_collectors_are_separate() -> None:
    with timed("alone") as switch:
        switch("still alone")
    with collect_seconds() as outer, timed("outer"), collect_seconds() as inner:
        slow(0)
    assert (set(outer), set(inner)) == ({"outer"}, {"slow"})


@pytest.mark.parametrize("name", TRAINED + LOCATED)
def test_every_editor_that_trains_says_where_its_seconds_go(name: str) -> None:
    stream = plain_stream(4)
    editor: Editor = EDITORS.get(name)()
    editor.prepare(build("gpt2"), stream.train_pool())
    e = stream.events(1)[0]
    start = time.perf_counter()
    report = editor.apply(EditBatch((e,), 1, {e.id: stream.paraphrases(e)}))
    took = time.perf_counter() - start
    sections = {k.removeprefix("seconds_"): v for k, v in report.notes.items() if k.startswith("seconds_")}
    assert not report.failed and ({"targets", "keys", "solve"} if name in LOCATED else {"capture", "train"}) <= set(sections)
    assert min(sections.values()) >= 0 and 0 < sum(sections.values()) <= took


def test_a_question_is_encoded_read_and_answered() -> None:
    handle, asked = build("gpt2"), ([Ask("what colour is the ship?")], ["no such answer at all"], 4)
    with collect_seconds() as seconds:
        ModelPredictor(handle, around=lambda batch: nullcontext()).respond(*asked)
    assert {"encode", "prefill", "decode", "score"} == set(seconds) and min(seconds.values()) > 0
    with collect_seconds() as seconds:  # packed prompts are tokenised before, and one forward reads and scores
        ModelPredictor(handle).respond(*asked)
    assert {"prefill", "decode"} == set(seconds) and min(seconds.values()) > 0
