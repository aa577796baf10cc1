"""CounterFact, zsRE, KnowEdit: layouts, subjects found from the questions, bad input, the cards' counts, speed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streams.base import BadStream, Stream, StreamConfig
from streams.files.subjects import subjects
from testbed.core.registry import STREAMS

CARDS = Path(__file__).parents[2] / "streams" / "cards"


def stream(name: str, root: Path, **config: Any) -> Stream:
    return STREAMS.get(name)(StreamConfig(data_root=root, **config))


def rome(i: int) -> dict[str, Any]:
    """A record of ROME's layout."""
    rewrite = {
        "prompt": "The tongue of {} is",
        "subject": f"Person {i}",
        "relation_id": f"P{i % 3}",
        "target_new": {"str": f"new {i}"},
        "target_true": {"str": f"old {i}"},
    }
    more = {
        "paraphrase_prompts": [f"Foo. Person {i} speaks"],
        "neighborhood_prompts": [f"The tongue of Neighbour {i}.{k} is" for k in (0, 1)],
    }
    return {"case_id": i, "requested_rewrite": rewrite, **more}


def put(root: Path, name: str, rows: Any) -> Path:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(rows))
    return root


def test_the_layout_of_rome(tmp_path: Path) -> None:
    s = stream("counterfact-yearly", put(tmp_path, "counterfact.json", [rome(i) for i in range(80)]))
    assert not s.skipped
    event = s.events(1)[0]
    number = event.target.split()[1]
    assert (event.prompt, event.subject) == (f"The tongue of Person {number} is", f"Person {number}")
    assert event.relation == f"P{int(number) % 3}"
    assert [q.answer for q in s.questions(event) if q.split == "locality_hard"] == [f"old {number}"] * 2


def test_the_new_answer_is_compared_with_the_old_one_and_a_neighbours_own_with_the_new_one(tmp_path: Path) -> None:
    s = stream("counterfact-yearly", put(tmp_path, "counterfact.json", [rome(i) for i in range(80)]))
    for event in (e for e in s.events(60) if e.kind != "retire"):
        number = event.source.rpartition(" ")[2]
        asked = [q for q in s.questions(event) if q.split.startswith("choice_")]
        assert all(q.scoring == "mean" and q.choices[0] == q.answer for q in asked)
        new, old, truth = event.target, event.previous, f"old {number}"
        assert [(q.split, q.choices) for q in asked if q.split != "choice_locality"] == [
            ("choice_edit", (new, old)),
            ("choice_generality", (new, old)),
        ]
        assert {q.choices for q in asked if q.split == "choice_locality"} == ({(truth, new)} if new != truth else set())


def test_a_neighbour_that_is_itself_edited_is_not_asked(tmp_path: Path) -> None:
    rows = [rome(i) for i in range(80)]
    for i, row in enumerate(rows):
        row["requested_rewrite"]["target_true"]["str"] = "French"
        row["neighborhood_prompts"] = [f"In other words: person {(i + 1) % 80} speaks", f"The tongue of Neighbour {i} is"]
    s = stream("counterfact-yearly", put(tmp_path, "counterfact.json", rows))
    reserved = {e.subject for e in s.events(10**6)} | {q.prompt.split(" of ")[1].removesuffix(" is") for q in s.train_pool().questions}
    for e in (e for e in s.events(40) if e.target != "French" and e.kind != "retire"):
        asked = [q.prompt for q in s.questions(e) if q.split == "locality_hard"]
        assert any("Neighbour" in p for p in asked)
        assert not any(subject and f"{subject.lower()} speaks" in p for p in asked for subject in reserved)


def test_the_layout_of_mend(tmp_path: Path) -> None:
    rows = [
        {"subject": f"S{i}", "src": f"Where is S{i}?", "alt": f"n{i}", "answers": [f"o{i}", f"p{i}"], "rephrase": f"S{i} is where?"}
        | {"loc": f"nq {i}", "loc_ans": f"a{i}"}
        for i in range(80)
    ]
    s = stream("zsre-yearly", put(tmp_path, "zsre_mend_eval.json", rows))
    event = s.events(1)[0]
    asked = {q.split: q for q in s.questions(event)}
    i = event.target[1:]
    assert (event.previous, event.subject, event.relation) == (f"o{i}", f"S{i}", "Where is {}?")
    assert (asked["locality_text"].prompt, asked["text_generality"].prompt) == (f"nq {i}", f"S{i} is where?")
    assert asked["stale"].aliases == (f"p{i}",)


def test_zsre_takes_portability_of_the_same_question_and_target(tmp_path: Path) -> None:
    rows = [{"edit_id": i, "requested_rewrite": f"Land of S{i}?", "target_old": f"o{i}", "target_new": f"n{i}"} for i in range(80)]
    root = put(tmp_path, "zsre/fullTest/edit_data.json", rows)
    alone = stream("zsre-yearly", root)
    port = {"Reasoning": [{"prompt": "Capital of that land?", "ground_truth": "c"}]}
    lent = [{"prompt": f"Land of S{i}?", "target_new": f"n{i}" if i % 2 else "else", "portability": port} for i in range(80)]
    put(tmp_path, "knowedit_portability/data/ZsRE/ZsRE-test-all.json", [*lent, {"prompt": "no target"}])
    s = stream("zsre-yearly", root)
    assert [e.id for e in s.events(60)] == [e.id for e in alone.events(60)] and s.data_hash() != alone.data_hash()
    assert "portability of 40 from ZsRE-test-all.json" in s.origin and "portability" not in alone.origin
    assert any("record 80" in x.where and "target_new" in x.reason for x in s.skipped)
    for e in s.events(60):
        asked = [q.answer for q in s.questions(e) if q.split == "portability"]
        number = int(e.prompt[len("Land of S") : -1])
        assert asked == (["c"] if number % 2 and e.target == f"n{number}" else [])
        assert not [q for q in alone.questions(e) if q.split == "portability"]


def test_a_portability_record_that_cannot_be_read_lends_nothing(tmp_path: Path) -> None:
    rows = [{"edit_id": i, "requested_rewrite": f"Land of S{i}?", "target_old": f"o{i}", "target_new": f"n{i}"} for i in range(40)]
    root = put(tmp_path, "zsre/fullTest/edit_data.json", rows)
    port = [{"prompt": "Capital of that land?", "ground_truth": "c"}, {"ask": "x"}]
    put(tmp_path, "knowedit_portability/data/ZsRE/ZsRE-test-all.json", [{"prompt": "Land of S3?", "target_new": "n3", "portability": port}])
    s = stream("zsre-yearly", root)
    assert "portability of 0" in s.origin
    assert [k.where for k in s.skipped] == ["ZsRE-test-all.json record 0"]


def test_portability_follows_the_records_own_target(tmp_path: Path) -> None:
    def row(i: int) -> dict[str, Any]:
        port = {"Reasoning": [{"prompt": f"Capital of the land of S{i}?", "ground_truth": [[f"c{i}", f"d{i}"]]}], "Alias": None}
        port["Subject_Aliasing"] = [{"prompt": f"Land of alias {i}?", "ground_truth": f"n{i}"}]
        base = {"subject": f"S{i}", "prompt": f"Land of S{i}?", "target_new": f"n{i}", "ground_truth": f"o{i}", "rephrase": f"S{i} lies in"}
        return base | {"portability": port, "locality": {"Relation_Specificity": [{"prompt": f"Age of S{i}?", "ground_truth": ["7"]}]}}

    s = stream("knowedit-yearly", put(tmp_path, "test_cf.json", [row(i) for i in range(80)]), revise=0.4)
    for e in s.events(120):
        ports = {q.prompt.split(" ")[0]: q for q in s.questions(e) if q.split == "portability"}
        number = e.prompt[len("Land of S") : -1]
        assert set(ports) == ({"Capital", "Land"} if e.target == f"n{number}" else {"Land"})
        assert ports["Land"].answer == (e.target or f"o{number}")


def test_subjects_are_found_from_the_questions_around() -> None:
    asked = [f"What school did {n} attend?" for n in ("Ann Lee", "Bob of Ely", "Øyvind Aas", "Cy Young Jr.")] + [
        f"What is {n}'s job?" for n in ("Ann Lee", "Dan", "Eve")
    ]
    found = [s[0] if s else None for s in subjects([*asked, "why is the sky blue?"])]
    assert found == ["Ann Lee", "Bob of Ely", "Øyvind Aas", "Cy Young Jr.", "Ann Lee", "Dan", "Eve", None]


def test_found_subjects_agree_with_the_annotated_ones(data_root: Path) -> None:
    rows = json.loads((data_root / "zsre/data/zsre/fullTest/edit_data.json").read_text(encoding="utf-8"))
    annotated = json.loads((data_root / "knowedit_portability/data/ZsRE/ZsRE-test-all.json").read_text(encoding="utf-8"))
    truth = {r["prompt"]: r["subject"] for r in annotated}
    questions = [r["requested_rewrite"] for r in rows]
    both = [(q, s) for q, s in zip(questions, subjects(questions)) if q in truth]
    right = sum(s is not None and s[0] == truth[q] for q, s in both)
    assert (right, len(both)) == (733, 752)


ONE = {
    "empty": ({"target_new": "", "prompt": "A 3"}, "target_new is empty"),
    "null": ({"target_new": None}, "target_new is null"),
    "object": ({"target_new": {"a": 1}}, "target_new must be text, found an object"),
    "same": ({"target_new": "the OLD 3"}, "target_new equals ground_truth"),
    "no old answer": ({"ground_truth": []}, "ground_truth is absent or empty"),
    "portability of unknown fields": ({"portability": {"a": [{"b": "x"}]}}, "portability holds b: expected a question"),
    "twice": ({"prompt": "P 2"}, "the same prompt stands in an earlier record"),
}


@pytest.mark.parametrize("name", list(ONE))
def test_a_bad_record_is_skipped_and_named(tmp_path: Path, name: str) -> None:
    change, reason = ONE[name]
    rows: list[Any] = [{"prompt": f"P {i}", "target_new": f"new {i}", "ground_truth": f"old {i}", "subject": f"{i}"} for i in range(40)]
    rows[3] |= change
    s = stream("knowedit-yearly", put(tmp_path, "test_cf.json", [*rows, 5]))
    assert [k.where for k in s.skipped] == ["test_cf.json record 3", "test_cf.json record 40"]
    assert reason in s.skipped[0].reason


def test_a_sample_of_records_is_the_same_under_every_seed(tmp_path: Path) -> None:
    put(tmp_path, "counterfact.json", [rome(i) for i in range(60)])
    whole, *drawn = (stream("counterfact-yearly", tmp_path, records=n, seed=s) for n, s in ((0, 0), (20, 0), (20, 1), (40, 0)))
    everything, few, again, more = ({q.prompt for q in s.beliefs()} for s in (whole, *drawn))
    assert few == again and few < more < everything
    assert ", 20 of them drawn" in drawn[0].origin and "drawn" not in whole.origin
    assert {e.prompt for e in drawn[0].events(100)} == {e.prompt for e in drawn[1].events(100)}
    assert [e.prompt for e in drawn[0].events(100)] != [e.prompt for e in drawn[1].events(100)]
    with pytest.raises(BadStream, match="records must be 0 or more, got -1"):
        stream("counterfact-yearly", tmp_path, records=-1)


def test_the_wrong_file_shows_its_fields(tmp_path: Path) -> None:
    with pytest.raises(BadStream, match=r"expected records with .*; found the fields a, b"):
        stream("counterfact-yearly", put(tmp_path, "counterfact.json", [{"a": 1, "b": 2}]))
    with pytest.raises(BadStream, match=r"has not the files of zsRE. Expected edit_data.json .*; found counterfact.json"):
        stream("zsre-yearly", tmp_path)
    with pytest.raises(BadStream, match="is not a folder"):
        stream("zsre-yearly", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "folder"), [("counterfact-yearly", "counterfact"), ("zsre-yearly", "zsre"), ("knowedit-yearly", "knowedit_portability")]
)
def test_the_card_says_what_the_files_give(name: str, folder: str, data_root: Path) -> None:
    s = stream(name, data_root / folder)
    usable, total = s.origin.partition("(")[2].split(" usable of ")
    never = s.origin.rpartition(", ")[2].split(" of them")[0]
    row = f"| {total.split(' ')[0]} | {usable} | {never} | {len(s.events(10**6)):,} |"
    assert row in (CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert len(s.skipped) == int(total.split(" ")[0].replace(",", "")) - int(usable.replace(",", ""))


def test_the_development_part_edits_what_no_run_edits_or_asks_about(tmp_path: Path) -> None:
    root = put(tmp_path, "counterfact.json", [rome(i) for i in range(200)])
    reported, development = stream("counterfact-yearly", root), stream("counterfact-yearly", root, development=True)
    edited = {e.source for e in reported.events(10**6)}
    events = development.events(10**6)
    assert events and not edited & {e.source for e in events}
    asked = {q.prompt for e in reported.events(10**6) for q in reported.questions(e)} | {q.prompt for q in reported.general()}
    assert not asked & {e.prompt for e in events}
    assert len(development.train_pool().questions) <= len(events)
    assert development.origin.endswith("never edited") and "development part" in development.origin
    with pytest.raises(BadStream, match=r"does not support stream\.development"):
        STREAMS.get("world-yearly")(StreamConfig(development=True))
