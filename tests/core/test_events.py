"""Edits and questions: ids that belong to content, values that are refused, order that is checked."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.core.events import KINDS, SPLITS, BadEvent, EditBatch, EditEvent, Picture, Question, check_order, content_id, hide_previous

texts = st.text(min_size=1).filter(str.strip)
times = st.floats(allow_nan=False, allow_infinity=False)


@dataclass(frozen=True)
class Dot:
    """A picture by its key alone."""

    key: str

    def load(self) -> np.ndarray:
        raise AssertionError("an id must not need the pixels")


def edit(**changes: Any) -> EditEvent:
    plain: dict[str, Any] = {"kind": "add", "time": 1.5, "seq": 0, "prompt": "Who leads the harbour?", "target": "Mara", "source": "file 3"}
    return EditEvent(**{**plain, **changes})


def question(**changes: Any) -> Question:
    plain: dict[str, Any] = {"split": "edit", "prompt": "Who leads the harbour?", "answer": "Mara", "event_id": "e1"}
    return Question(**{**plain, **changes})


@given(texts, texts, times, times, st.integers(0, 10**6))
def test_id_of_an_edit_is_its_content_and_not_its_place(prompt: str, target: str, a: float, b: float, seq: int) -> None:
    first = edit(prompt=prompt, target=target, time=a)
    assert edit(prompt=prompt, target=target, time=b, seq=seq).id == first.id
    assert edit(prompt=prompt, target=target + "!", time=a).id != first.id


def test_id_is_the_same_on_every_machine() -> None:
    assert content_id("edit", None, "é", ["a"]) == "62d65bebf65aa6d3"


@pytest.mark.parametrize("field", ["prompt", "target", "previous", "subject", "relation", "source"])
def test_every_field_of_content_moves_the_id(field: str) -> None:
    assert edit(**{field: "another"}).id != edit().id


def test_pictures_move_the_id_by_their_key_alone() -> None:
    assert edit(image=Dot("a")).id == edit(image=Dot("a")).id
    assert len({edit(image=Dot("a")).id, edit(image=Dot("b")).id, edit().id}) == 3
    assert isinstance(Dot("a"), Picture)


@given(st.lists(texts, max_size=4))
def test_id_of_a_question_does_not_depend_on_the_order_of_aliases(aliases: list[str]) -> None:
    assert question(aliases=tuple(aliases)).id == question(aliases=tuple(reversed(aliases))).id


@pytest.mark.parametrize(
    "changes", [{"split": "text_generality"}, {"answer": "Ola"}, {"event_id": "e2"}, {"topic": "x"}, {"image": Dot("a")}]
)
def test_every_field_of_a_question_moves_its_id(changes: dict[str, Any]) -> None:
    assert question(**changes).id != question().id


BAD_EDITS: list[tuple[dict[str, Any], str]] = [
    ({"kind": "delete"}, "kind must be one of add, revise, revert, retire, got 'delete'"),
    ({"prompt": ""}, "prompt must be text that is not empty"),
    ({"prompt": " \n"}, "prompt must be text"),
    ({"prompt": None}, "got None"),
    ({"target": ""}, "target must be text"),
    ({"target": 7}, "got 7"),
    ({"time": float("nan")}, "time must be a finite number of years"),
    ({"time": float("inf")}, "finite"),
    ({"time": "1999"}, "'1999'"),
    ({"time": True}, "True"),
    ({"seq": -1}, "seq must be 0 or more, got -1"),
    ({"kind": "revise"}, "a revise must name the event it revises"),
    ({"kind": "revert"}, "a revert must name"),
    ({"kind": "retire", "target": ""}, "a retire must name"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_EDITS)
def test_bad_edits_are_refused_with_field_value_and_source(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadEvent, match=message) as caught:
        edit(**changes)
    assert "file 3" in str(caught.value)


BAD_QUESTIONS: list[tuple[dict[str, Any], str]] = [
    ({"split": "edits"}, "split must be one of edit, "),
    ({"prompt": ""}, "prompt must be text.*question of event e1"),
    ({"answer": None}, "a edit question needs an answer"),
    ({"answer": None, "split": "general"}, "needs an answer"),
    ({"answer": " "}, "answer must be text"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_QUESTIONS)
def test_bad_questions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadEvent, match=message):
        question(**changes)


@pytest.mark.parametrize("split", [s for s in SPLITS if s.startswith("locality") or s == "text"])
def test_locality_and_running_text_need_no_answer(split: str) -> None:
    assert question(split=split, answer=None, aliases=("x",)).golds == ()


def test_golds_are_the_answer_and_its_aliases() -> None:
    assert question(aliases=("M.",)).golds == ("Mara", "M.")


def test_events_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        edit().target = "Ola"  # type: ignore[misc]


def test_a_retire_has_no_target_and_years_are_floors() -> None:
    gone = edit(kind="retire", target="", revises="e0", time=-0.5)
    assert (gone.target, gone.year) == ("", -1)
    assert [edit(time=t).year for t in (1.0, 1.99, 2.0)] == [1, 1, 2]


def test_a_fact_is_its_subject_and_relation_or_else_picture_and_prompt() -> None:
    assert edit(subject="Ilia", relation="leader").fact == ("Ilia", "leader")
    assert edit(subject="Ilia").fact == ("", "Who leads the harbour?")
    assert edit(image=Dot("a")).fact == ("a", "Who leads the harbour?")


def test_the_old_answer_is_hidden_and_the_id_kept() -> None:
    e = edit(previous="Ola")
    hidden = hide_previous(e)
    assert (hidden.previous, hidden.id, hidden.target) == (None, e.id, "Mara")
    assert hide_previous(hidden) is hidden


def test_a_batch_refuses_the_same_edit_twice() -> None:
    with pytest.raises(BadEvent, match=f"step 4 holds the same edit twice: {edit().id}"):
        EditBatch((edit(), edit(seq=1)), step=4)
    assert len(EditBatch((edit(), edit(prompt="another?")))) == 2


def ordered() -> list[EditEvent]:
    first = edit()
    return [first, edit(kind="revise", seq=1, target="Ola", revises=first.id), edit(seq=2, time=2.0, prompt="another?")]


def test_a_good_order_passes() -> None:
    check_order(ordered())
    check_order([])
    assert {e.kind for e in ordered()} <= set(KINDS)


@pytest.mark.parametrize(
    ("at", "changes", "message"),
    [
        (2, {"time": 1.0}, r"event 2 \(file 3\) is dated 1.0, before the one ahead of it"),
        (2, {"seq": 5}, "event 2 .* has seq 5; seq must be its position"),
        (0, {"kind": "revise", "revises": "later", "id": ""}, "revises later, which does not come before it"),
    ],
)
def test_a_bad_order_is_refused(at: int, changes: dict[str, Any], message: str) -> None:
    events = ordered()
    events[at] = replace(events[at], **changes)
    with pytest.raises(BadEvent, match=message):
        check_order(events)


def test_the_same_change_twice_is_refused() -> None:
    events = ordered()
    with pytest.raises(BadEvent, match="repeats id"):
        check_order([*events, replace(events[2], seq=3)])
