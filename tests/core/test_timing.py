"""Seconds by stage: what is heard, by whom, and that what is not listened to stays silent."""

from __future__ import annotations

import time

import pytest

from testbed.core.events import Ask, EditBatch
from testbed.core.registry import EDITORS
from testbed.core.timing import collected, running, stage
from testbed.editors.base import Editor
from testbed.model.predictor import ModelPredictor
from tests.helpers.models import build
from tests.helpers.plain_stream import plain as plain_stream

TRAINED = [n for n in EDITORS.names() if n in ("finetune", "finetune-l", "balancedit", "balancedit-plus", "grace", "wise", "elder", "lora")]
LOCATED = [n for n in EDITORS.names() if n in ("rome", "memit", "alphaedit", "pmet", "emmet")]


@stage("slow")
def slow(seconds: float) -> float:
    time.sleep(seconds)
    with stage("inner"):
        time.sleep(seconds)
    return seconds


def test_a_stage_counts_for_what_it_calls() -> None:
    with collected() as seconds:
        assert slow(0.01) == 0.01
        with stage("inner"):
            slow(0.01)
    assert set(seconds) == {"slow", "inner"}
    assert min(seconds.values()) >= 0.02


def fail_in_the_second() -> None:
    with stage("first") as turn:
        assert running() == "first"
        turn("second")
        assert running() == "second"
        raise ValueError("no")


def test_a_stage_may_turn_into_another_and_ends_when_its_work_fails() -> None:
    with collected() as seconds:
        with pytest.raises(ValueError, match="no"):
            fail_in_the_second()
        assert running() is None
    assert list(seconds) == ["first", "second"]


def test_nobody_listening_nothing_is_kept_and_listeners_do_not_hear_each_other() -> None:
    with stage("alone") as turn:
        turn("still alone")
        assert running() is None
    with collected() as outer, stage("outer"):
        with collected() as inner:
            slow(0)
        assert running() == "outer"
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
    stages = {k.removeprefix("seconds_"): v for k, v in report.notes.items() if k.startswith("seconds_")}
    assert not report.failed and ({"targets", "keys", "solve"} if name in LOCATED else {"capture", "train"}) <= set(stages)
    assert min(stages.values()) >= 0 and 0 < sum(stages.values()) <= took


def test_a_question_is_encoded_read_and_answered() -> None:
    predictor = ModelPredictor(build("gpt2"))
    with collected() as seconds:
        predictor.respond([Ask("what colour is the ship?")], ["no such answer at all"], 4)
    assert {"encode", "prefill", "decode", "score"} == set(seconds) and min(seconds.values()) > 0
