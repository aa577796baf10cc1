"""HalluEditBench: the faces of a corrected fact, the stated filters, the choice of the named model, bad input, the card's counts."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from streams.base import BadStream, Stream, StreamConfig
from streams.files.hallueditbench import names
from testbed.core.registry import STREAMS
from testbed.experiment.schedule import ScheduleConfig, build
from testbed.probes.faces import NUMBERS

MODEL = "llama_9"
CARD = Path(__file__).parents[2] / "streams" / "cards" / "hallueditbench-yearly.md"


def row(i: int, model: str = MODEL, **more: str) -> dict[str, str]:
    fact = {"topic": "sport", "subject": f"Ann {i}", "relation": "coach", "object": f"Bob {i}z", "question": f"Who coaches Ann {i}?"}
    faces = {
        f"output_{model}": f"Cy {i}z",
        f"eval_{model}": "0.0",
        "paraphrased_question": f"Who is the trainer of Ann {i}?",
        "multiple_choice_with_letters": f"A. Cy {i}z  B. J. K. Dee  C. Bob {i}z  D. Eve",
        "multiple_choice_labels": "C",
        "yes_question": f"Is Bob {i}z the coach of Ann {i}?",
        "no_question": f"Is Cy {i}z the coach of Ann {i}?",
        "locality_question": f"How old is Ann {i}?",
        "reversed_relation_question": f"Whom does Bob {i}z coach?",
    }
    hops = {f"question_{k}hop": f"Question of {k} hops from Ann {i}?" for k in range(2, 7)} | {
        f"answer_{k}hop": f"end {k}" for k in range(2, 7)
    }
    return fact | faces | hops | more


def put(root: Path, rows: list[dict[str, str]], folder: str = MODEL, name: str = "sport.csv") -> Path:
    (root / folder).mkdir(parents=True, exist_ok=True)
    with (root / folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root


def stream(root: Path, **config: Any) -> Stream:
    return STREAMS.get("hallueditbench-yearly")(StreamConfig(data_root=root, **config))


def adds(s: Stream) -> dict[int, dict[str, list[Any]]]:
    """The questions by split of each first edit, by the number of its subject."""
    out: dict[int, dict[str, list[Any]]] = {}
    for e in s.events(10**6):
        own: dict[str, list[Any]] = {}
        for q in s.questions(e) if e.kind == "add" else ():
            own.setdefault(q.split, []).append(q)
        out |= {int((e.subject or "").split()[1]): own} if own else {}
    return out


def test_a_fact_is_asked_from_every_side(tmp_path: Path) -> None:
    s = stream(put(tmp_path, [row(i) for i in range(60)]))
    i, asked = next(iter(adds(s).items()))
    assert {(q.answer, q.prompt.split(" ")[1]) for q in asked["generality_yes_no"]} == {("Yes", "Bob"), ("No", "Cy")}
    assert all((q.choices, q.scoring) == (("Yes", "No"), "sum") for split in ("generality_yes_no", "robustness") for q in asked[split])
    assert {(q.answer, q.prompt) for q in asked["robustness"]} == {
        ("Yes", f"Who coaches Ann {i}? Bob {i}z\nAre you sure? Is Bob {i}z the coach of Ann {i}?"),
        ("No", f"Who coaches Ann {i}? Cy {i}z\nAre you sure? Is Cy {i}z the coach of Ann {i}?"),
    }
    (choice,) = asked["generality_choice"]
    options = f"A. Cy {i}z\nB. J. K. Dee\nC. Bob {i}z\nD. Eve"
    assert (choice.answer, choice.prompt) == ("C", f"Who coaches Ann {i}?\n{options}\nAnswer:")
    assert [q.answer for q in asked["generality_reversed"]] == [f"Ann {i}"]
    hops = ["portability", *(f"portability_{k}hop" for k in range(3, 7))]
    assert [[q.answer for q in asked[split]] for split in hops] == [[f"end {k}"] for k in range(2, 7)]
    assert any(q.prompt == f"How old is Ann {i}?" and q.answer is None for q in asked["locality_sibling"])
    assert (asked["stale"][0].answer, asked["edit"][0].answer) == (f"Cy {i}z", f"Bob {i}z")


def test_no_face_is_asked_of_a_value_that_the_record_does_not_name(tmp_path: Path) -> None:
    """An option's letter may equal a target: the choice still does not move with the value."""
    rows = [row(i, object="C", multiple_choice_with_letters="A. B  B. D  C. C", yes_question="Is it C?") for i in range(30)]
    s = stream(put(tmp_path, [*rows, *(row(i) for i in range(30, 60))]), revise=0.5)
    later = [
        e for e in s.events(10**6) if e.kind == "revise" and e.target != "C" and not e.target.startswith(f"Bob {(e.subject or '')[4:]}z")
    ]
    assert later
    assert not {q.split for e in later for q in s.questions(e)} & {*NUMBERS, "portability"}


LEFT_OUT = {
    "a shared reversed question": ({"reversed_relation_question": "Whom?"}, "generality_reversed", "is shared by several records"),
    "a reversed question with its answer": ({"reversed_relation_question": "Is it Ann 3?"}, "generality_reversed", "contains its answer"),
    "a hop that names the edit": ({"question_2hop": "Age of Bob 3z?"}, "portability", "contains the edited answer"),
    "a hop that names its end": ({"question_4hop": "Is it end 4?"}, "portability_4hop", "gives its answer away"),
    "a hop back to the edit": ({"answer_3hop": "bob 3Z"}, "portability_3hop", "gives its answer away"),
    "a hop without an answer": ({"answer_5hop": " "}, "portability_5hop", "answer_5hop is absent or empty"),
    "an option that is not the answer": ({"multiple_choice_labels": "A"}, "generality_choice", "does not offer the answer once"),
    "options that are the same": (
        {"multiple_choice_with_letters": "A. the Eve  B. Eve  C. Bob 3z"},
        "generality_choice",
        "the answer once",
    ),
    "the paraphrase with the answer": ({"paraphrased_question": "Is it Bob 3z?"}, "text_generality", "contains the answer"),
    "locality of somebody else": ({"locality_question": "How old is Dan?"}, "", "does not name the subject"),
    "locality of the edit itself": ({"locality_question": "Who now coaches Ann 3?"}, "", "asks for a fact of a record in other words"),
}


@pytest.mark.parametrize("name", list(LEFT_OUT))
def test_a_question_that_cannot_be_asked_is_left_out_and_counted(tmp_path: Path, name: str) -> None:
    change, split, reason = LEFT_OUT[name]
    rows = [row(i) | (change if i == 3 or "Whom?" in change.values() else {}) for i in range(40)]
    s = stream(put(tmp_path, rows), revise=0.0, revert=0.0, retire=0.0)
    passed, before = s.manifest()["passed_over"], stream(put(tmp_path / "whole", [row(i) for i in range(40)])).manifest()["read"]
    assert any(reason in note for note in passed), passed
    lost = Counter(before)
    lost.subtract(s.manifest()["read"])
    key = {"": "locality_sibling", "text_generality": "held-out paraphrases"}.get(split, split)
    assert {k: n for k, n in lost.items() if n} == {key: 40 if "Whom?" in change.values() else 1}


SKIPPED = {
    "the answer in the question": ({"question": "Does Bob 3z coach Ann 3?"}, "the question contains the answer"),
    "nothing wrong": ({f"output_{MODEL}": "bob 3z"}, "object equals output_llama_9: the edit would change nothing"),
    "a right verdict": ({f"eval_{MODEL}": "1.0"}, "output_llama_9 counts as right: there is nothing to correct"),
    "no wrong answer": ({f"output_{MODEL}": ""}, "output_llama_9 is absent or empty"),
    "no answer": ({"object": ""}, "object is empty"),
    "no subject": ({"subject": " "}, "subject is absent or empty"),
    "the same fact again": ({"subject": "Ann 2", "question": "Ann 2's coach?"}, "the same subject with the same relation stands"),
    "the same question again": ({"relation": "x", "question": "Who coaches Ann 2?"}, "the same prompt stands in an earlier record"),
}


@pytest.mark.parametrize("name", list(SKIPPED))
def test_a_record_that_cannot_be_used_is_skipped_and_named(tmp_path: Path, name: str) -> None:
    change, reason = SKIPPED[name]
    s = stream(put(tmp_path, [row(i) | (change if i == 3 else {}) for i in range(40)]))
    assert [k.where for k in s.skipped] == ["sport.csv record 3"]
    assert reason in s.skipped[0].reason


def test_a_short_answer_counts_as_named_only_as_a_word() -> None:
    assert names("What is written in C?", "c") and not names("Who programs in FreeBASIC?", "C")
    assert names("What was architectural firm practised by?", "Architect")


def test_the_model_is_named_where_there_are_several(tmp_path: Path) -> None:
    for model in ("llama_9", "mistral_9"):
        put(tmp_path / "data/questions/hallucination_final", [row(i, model) for i in range(40)], model)
    with pytest.raises(
        BadStream, match=r"holds the wrong answers of llama_9, mistral_9: name one of these models by stream\.hallucinations_of"
    ):
        stream(tmp_path)
    with pytest.raises(BadStream, match=r"name one of these models"):
        stream(tmp_path, hallucinations_of="gemma")
    s = stream(tmp_path, hallucinations_of="mistral_9")
    assert s.origin.startswith("HalluEditBench files, what mistral_9 gets wrong in 1 topics (40 usable of 40 records)")
    alone = stream(tmp_path / "data/questions/hallucination_final/mistral_9")
    assert [e.id for e in alone.events(30)] == [e.id for e in s.events(30)]
    with pytest.raises(BadStream, match="holds the wrong answers of mistral_9, not of llama_9"):
        stream(tmp_path / "data/questions/hallucination_final/mistral_9", hallucinations_of="llama_9")
    with pytest.raises(BadStream, match=r"does not support stream\.hallucinations_of"):
        STREAMS.get("world-yearly")(StreamConfig(hallucinations_of="llama_9"))


def test_the_same_fact_has_the_same_role_whatever_the_model(tmp_path: Path) -> None:
    rows = [row(i, "m") for i in range(200)]
    one, other = stream(put(tmp_path / "a", rows, "m")), stream(put(tmp_path / "b", rows[::-1][:150], "m"))
    edited = [{e.subject for e in s.events(10**6)} for s in (one, other)]
    assert edited[1] == {name for name in edited[0] if int((name or "").split()[1]) >= 50}


def test_another_file_is_refused_with_its_fields(tmp_path: Path) -> None:
    with pytest.raises(BadStream, match=r"expected records with subject, .* and one column output_MODEL; found the fields a, b"):
        stream(put(tmp_path / "x", [{"a": "1", "b": "2"}]))
    with pytest.raises(BadStream, match=r"found the fields topic, .*Is this the right file"):
        stream(put(tmp_path / "y", [row(0) | {"output_other": "z"}]))
    mixed = put(tmp_path / "z", [row(0)])
    with pytest.raises(BadStream, match=r"holds the wrong answers of other, not of llama_9"):
        stream(put(mixed, [row(1, "other")], name="tea.csv"))
    with pytest.raises(BadStream, match=r"has not the files of hallueditbench-yearly"):
        stream(put(tmp_path / "w", [row(0)], name="sport.txt"))


def test_keep_wrong_leaves_the_true_targets_as_they_are(tmp_path: Path) -> None:
    put(tmp_path, [row(i) for i in range(60)])
    every, wrong = stream(tmp_path), stream(tmp_path, keep="wrong")
    assert every.events(10**6) == wrong.events(10**6)
    assert "true targets" not in wrong.origin


def test_the_probe_asks_both_of_a_pair(tmp_path: Path) -> None:
    s = stream(put(tmp_path, [row(i) for i in range(60)]), revise=0.0, revert=0.0, retire=0.0)
    planned = build(s, s.events(20), ScheduleConfig(5, 0, 10**6))
    asked = [q.plan for step in planned.steps if step.checkpoint.full for q in step.questions if q.probe == "faces"]
    assert {p.question.split for p in asked} == set(NUMBERS)
    for split in ("generality_yes_no", "robustness"):
        assert len({p.question.answer for p in asked if p.question.split == split}) == 2
        counts = Counter(p.question.answer for p in asked if p.question.split == split)
        assert counts["Yes"] == counts["No"]


def test_the_card_says_what_the_files_give(data_root: Path) -> None:
    s = stream(data_root / "hallueditbench")
    usable, total = s.origin.partition("(")[2].removesuffix(" never edited").split(" records)")[0].split(" usable of ")
    never = s.origin.rpartition(", ")[2].split(" of them")[0]
    assert f"| meta_llama_3_8b_instruct | {total} | {usable} | {never} | {len(s.events(10**6)):,} |" in CARD.read_text(encoding="utf-8")
    assert Counter(k.reason.split(":")[0].split(" stands")[0] for k in s.skipped) == {
        "the question contains the answer": 81,
        "object equals output_meta_llama_3_8b_instruct": 8,
        "the same subject with the same relation": 8,
    }
    passed = s.manifest()["passed_over"]
    assert passed["reversed_relation_question is shared by several records: not asked"] == 431
    assert passed["locality_question does not name the subject: not asked"] == 130
