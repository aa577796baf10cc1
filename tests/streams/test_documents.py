"""UnKE and EditEvery: long targets, sub-questions, what the sources lack, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streams.base import BadStream, Stream, StreamConfig
from testbed.core.registry import STREAMS

CARDS = Path(__file__).parents[2] / "streams" / "cards"
N = 40


def row(i: int, **more: Any) -> dict[str, Any]:
    document = f"Ann {i} was born in Town {i}, where her parents kept a mill. " + "She wrote letters, sang, and taught the young. " * 4
    sub = {"sub_question": [f"Where was Ann {i} born?", f"What did the parents of Ann {i} keep?"], "sub_answer": [f"Town {i}.", "A mill."]}
    return {"id": i, "question": f"Who is Ann {i}?", "para_question": f"What is known of Ann {i}?", "answer": document} | sub | more


def stream(root: Path, rows: Any, name: str = "unke-yearly", **config: Any) -> Stream:
    (root / {"unke-yearly": "final_data_v2.json", "editevery-yearly": "editevery.json"}[name]).write_text(json.dumps(rows))
    return STREAMS.get(name)(StreamConfig(data_root=root, **config))


def test_a_document_is_asked_whole_rephrased_and_in_parts(tmp_path: Path) -> None:
    s = stream(tmp_path, [row(i) for i in range(N)])
    event = s.events(1)[0]
    i = int(event.prompt.removeprefix("Who is Ann ").removesuffix("?"))
    asked = {(q.split, q.prompt): q.answer for q in s.questions(event)}
    assert (
        event.target
        == row(i)["answer"].strip()
        == asked["edit", f"Who is Ann {i}?"]
        == asked["text_generality", f"What is known of Ann {i}?"]
    )
    assert asked["sub_question", f"Where was Ann {i} born?"] == f"Town {i}."
    assert {answer for (split, _), answer in asked.items() if split == "locality_far"} == {None}
    assert {q.split for q in s.general()} == {"text"} and s.train_pool().texts


def test_nothing_is_revised_or_withdrawn_where_no_old_answer_is_known(tmp_path: Path) -> None:
    s = stream(tmp_path, [row(i) for i in range(N)], revise=0.4, retire=0.2)
    assert {e.kind for e in s.events(10**6)} == {"add"} and not {q.split for e in s.events(9) for q in s.questions(e)} & {"stale"}
    with pytest.raises(BadStream, match=r"stream.keep=wrong needs true answers"):
        stream(tmp_path, [row(i) for i in range(N)], keep="wrong")


def test_line_breaks_become_spaces_and_are_counted(tmp_path: Path) -> None:
    rows = [{"id": i, "question": f"Write poem {i}.", "answer": f"Line {i},\n\n  and another", "category": "poetry"} for i in range(N)]
    s = stream(tmp_path, rows, "editevery-yearly")
    event = s.events(1)[0]
    assert event.target == f"Line {event.prompt[11:-1]}, and another" and event.relation == "poetry"
    assert s.manifest()["passed_over"] == {"a document of several lines is written in one": N}


LEFT_OUT = {
    "the edited question": ({"sub_question": ["Who is Ann 3?", "Else?"]}, "is the edited question"),
    "asked by two": ({"sub_question": ["Where was Ann 2 born?", "Else?"]}, "is asked by several records"),
    "with its answer": ({"sub_answer": ["Town 3.", "The parents of Ann 3"]}, "contains its answer"),
}


@pytest.mark.parametrize("name", list(LEFT_OUT))
def test_a_sub_question_that_cannot_be_asked_is_left_out_and_counted(tmp_path: Path, name: str) -> None:
    change, reason = LEFT_OUT[name]
    s = stream(tmp_path, [row(i) | (change if i == 3 else {}) for i in range(N)])
    assert any(reason in note for note in s.manifest()["passed_over"])
    assert s.manifest()["read"]["sub_question"] < 2 * N


SKIPPED = {
    "no document": ({"answer": " "}, "answer is empty"),
    "a number of answers": ({"sub_answer": ["one"]}, "sub_question holds 2 questions and sub_answer 1 answers"),
    "an object": ({"sub_question": {"a": 1}}, "sub_question must be text, found an object"),
    "the same question": ({"question": "Who is Ann 2?"}, "the same prompt stands in an earlier record"),
}


@pytest.mark.parametrize("name", list(SKIPPED))
def test_a_record_that_cannot_be_used_is_skipped_and_named(tmp_path: Path, name: str) -> None:
    change, reason = SKIPPED[name]
    s = stream(tmp_path, [row(i) | (change if i == 3 else {}) for i in range(N)])
    assert [k.where for k in s.skipped] == ["final_data_v2.json record 3"]
    assert reason in s.skipped[0].reason


def test_another_file_is_refused_with_its_fields(tmp_path: Path) -> None:
    with pytest.raises(BadStream, match=r"expected records with question and answer; found the fields a"):
        stream(tmp_path, [{"a": 1}])


@pytest.mark.parametrize("name", ["unke-yearly", "editevery-yearly"])
def test_the_card_says_what_the_files_give(name: str, data_root: Path) -> None:
    s = STREAMS.get(name)(StreamConfig(data_root=data_root))
    usable, total = s.origin.partition("(")[2].split(" records)")[0].split(" usable of ")
    never = s.origin.rpartition(", ")[2].split(" of them")[0]
    row = f"| {total} | {usable} | {never} | {len(s.events(10**6)):,} |"
    assert row in (CARDS / f"{name}.md").read_text(encoding="utf-8")
