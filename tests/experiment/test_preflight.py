"""Questions that free generation can never answer rightly are counted before the first edit."""

from __future__ import annotations

from testbed.core.events import Question
from testbed.experiment.preflight import never_right
from testbed.experiment.schedule import ScheduleConfig, build
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
