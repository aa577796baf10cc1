"""Edits for methods that learn to edit: what a run says about them, and which it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from streams.base import BadStream, StreamConfig, TrainEdit, TrainPool, touches
from testbed.core.events import Ask, EditEvent, Question
from testbed.core.registry import STREAMS
from tests.helpers.models import Noise


def train_edit(subject: str, picture: int | None = None, target: str = "green", asks: tuple[Ask, ...] = ()) -> TrainEdit:
    image = None if picture is None else Noise(picture)
    event = EditEvent("add", 0.0, 0, f"Who leads {subject}?", target, image, "red", subject, "head")
    return TrainEdit(event, asks)


EVENTS = [EditEvent("add", 1.0, 0, "Who leads Zor?", "Mara Venn", Noise(1), subject="Zor", relation="head")]
QUESTIONS = [Question("locality_far", "what colour is the ship?", "blue", EVENTS[0].id)]
TOUCHING = {
    "subject": train_edit("Zor"),
    "picture": train_edit("Ulm", picture=1),
    "picture of a rephrasing": train_edit("Ulm", asks=(Ask("Who is this?", Noise(1)),)),
    "question": train_edit("Ulm", asks=(Ask("what colour is the ship?"),)),
}


@pytest.mark.parametrize("edit", TOUCHING.values(), ids=TOUCHING)
def test_a_train_edit_that_touches_the_stream_is_refused(edit: TrainEdit) -> None:
    pool = TrainPool(find_edits=lambda: (train_edit("Orb"), edit)).apart_from(EVENTS, QUESTIONS)
    with pytest.raises(BadStream, match="1 of 2 train edits touch the stream"):
        _ = pool.edits


def test_the_refusal_names_three_examples() -> None:
    pool = TrainPool(find_edits=lambda: (*TOUCHING.values(), train_edit("Orb"))).apart_from(EVENTS, QUESTIONS)
    with pytest.raises(BadStream) as error:
        _ = pool.edits
    assert "4 of 5" in str(error.value)
    assert str(error.value).count("; ") == 2


def test_other_train_edits_pass_and_shared_answers_are_counted() -> None:
    lines: list[str] = []
    edits = (train_edit("Orb", picture=2), train_edit("Ulm", target="Mara Venn"))
    pool = TrainPool(find_edits=lambda: edits).apart_from(EVENTS, QUESTIONS, lines.append)
    assert lines == []  # nothing is looked for before a method asks
    assert pool.edits == edits
    assert lines == [
        "2 train edits share no subject, picture or question with the stream; 1 of its 1 different answers are answers of theirs too"
    ]


def test_a_retirement_has_no_answer_to_share() -> None:
    gone = replace(EVENTS[0], kind="retire", target="", revises=EVENTS[0].id, id="")
    lines: list[str] = []
    _ = TrainPool(find_edits=lambda: (train_edit("Orb"),)).apart_from([*EVENTS, gone], [], lines.append).edits
    assert "0 of its 1 different answers" in lines[0]


@pytest.mark.parametrize("name", ["world-yearly", "okedit-yearly", "countries-yearly"])
@pytest.mark.parametrize("seed", [0, 7])
def test_no_stream_has_train_edits_that_its_events_touch_under_any_order(name: str, seed: int) -> None:
    stream = STREAMS.get(name)(StreamConfig(seed=seed))
    events = stream.events(400)
    edits = stream.train_pool().edits
    assert edits
    assert touches(edits, events, [q for e in events[::7] for q in stream.questions(e)]) == []
