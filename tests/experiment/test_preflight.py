"""Questions that free generation can never answer rightly are counted before the first edit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from testbed.core.events import Ask, Question
from testbed.core.registry import EDITORS
from testbed.editors.locate.core import LocateEditor
from testbed.experiment.preflight import check, long_targets, never_right, new_tokens
from testbed.experiment.schedule import ScheduleConfig, build
from testbed.model.encoding import prompt_inputs
from testbed.model.handle import BadModel
from testbed.model.predictor import ModelPredictor
from tests.helpers.editor_suite import NAMES
from tests.helpers.models import build as build_model
from tests.helpers.plain_stream import Line, PlainStream


class Asked(PlainStream):
    """One edit with the given questions."""

    def __init__(self, *asked: Question) -> None:
        super().__init__([Line(1.0)])
        self.asked = asked

    def questions(self, event):
        return self.asked


def notes(*answers: tuple[str, ...], tokens: int = 4) -> list[str]:
    handle = build_model("llama")
    asked = Asked(*(Question("edit", f"Who is {i}?", a[0], aliases=a[1:]) for i, a in enumerate(answers)))
    planned = build(asked, asked.all, ScheduleConfig())
    assert planned.unique_questions
    return [n for n in never_right(planned, handle, tokens) if n]


def test_answers_of_two_lines_and_long_answers_are_counted() -> None:
    assert notes(("a b",)) == []
    assert notes(("a\nb",)) == ["1 questions can never be right by free generation: the answer has more than one line"]
    assert notes(("a b c d e f g h",)) == [
        "1 questions can never be right by free generation: the answer is longer than 4 tokens (--max-new-tokens)"
    ]
    assert notes(("a b c d e f g h",), tokens=40) == []


def test_an_alias_that_can_be_given_is_enough() -> None:
    assert notes(("a\nb", "a")) == []


def test_generations_end_at_the_window_behind_the_longest_prompt() -> None:
    handle = build_model("gpt2")
    words = " ".join(f"w{i}" for i in range(60))
    asked = Asked(Question("edit", "Who?", "a"), Question("text_generality", words, "a"))
    planned = build(asked, asked.all, ScheduleConfig())
    check(planned, handle)
    longest = prompt_inputs(handle, Ask(words))["input_ids"].shape[1]
    room = handle.window - longest
    assert 0 < room < 200
    assert (new_tokens(planned, handle, 4), new_tokens(planned, handle, 500)) == (4, room)
    (response,) = ModelPredictor(handle).respond([Ask(words)], ["a"], room)
    assert response.score is not None


def test_a_document_longer_than_the_window_is_refused_before_the_first_edit() -> None:
    handle = build_model("llama")
    asked = Asked(Question("edit", "Who is Ann?", "word " * (2 * handle.window)))
    with pytest.raises(BadModel, match=rf"takes \d+ tokens, .* reads {handle.window}: 'Who is Ann\?'"):
        check(build(asked, asked.all, ScheduleConfig()), handle)


def long_note(words: int, names: Iterable[str]) -> list[str]:
    """The notes on long targets for a stream of one short target and one of so many words."""
    short, other = PlainStream([Line(1.0), Line(1.5)]).all
    events = [short, replace(other, target=" ".join(["and"] * words), id="")]
    return long_targets(events, build_model("llama"), {name: EDITORS.get(name) for name in names})


def test_a_long_target_is_warned_of_where_an_edit_has_room_for_a_few_tokens_and_nowhere_else() -> None:
    named = {n for n in NAMES if EDITORS.get(n).traits.short_targets}
    assert named >= {n for n in NAMES if issubclass(EDITORS.get(n), LocateEditor)}
    assert not named & {"scr", "lora", "locft", "finetune", "balancedit", "ultraedit", "mend", "noop"}
    assert {"alphaedit", "rome", "neuraldb", "grace"} <= named
    (note,) = long_note(200, NAMES)
    told, _, rest = note.partition(": ")
    assert set(told.split(", ")) == named
    assert "no published form for long targets: 1 of 2 targets have more than 50 tokens, the longest " in rest


def test_short_targets_and_editors_that_take_long_ones_get_no_warning() -> None:
    assert long_note(2, NAMES) == []
    assert long_note(200, ("scr", "lora", "locft", "balancedit")) == []
