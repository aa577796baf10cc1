"""What users' files hold and a reader could lose without a word: each value is read, or counted, or refused with its reason."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.__main__ import InspectConfig, inspect_stream
from streams.base import BadStream, Stream, StreamConfig
from streams.files.records import BadField, span_of, text_at, texts_in
from testbed.core.events import check_order
from testbed.core.registry import STREAMS
from testbed.experiment.schedule import ScheduleConfig, build
from tests.helpers.own_records import N, passed_over, questions, record, stream

# values ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2006.0, "2006"),
        (2006, "2006"),
        (-0.5, "-0.5"),
        (1e21, "1e+21"),
        (date(2020, 2, 3), "2020-02-03"),
        (datetime(2020, 2, 3), "2020-02-03"),
        (datetime(2020, 2, 3, 4, 5, tzinfo=UTC), "2020-02-03 04:05:00+00:00"),
        ("R&amp;D ", "R&D"),
        ("a < b", "a < b"),
    ],
)
def test_a_value_is_written_as_people_write_it(value: object, text: str) -> None:
    assert texts_in(value, "x") == (text,)


@pytest.mark.parametrize(
    "value", [None, math.nan, "", "  ", "</s>", "<|endoftext|>", "<|im_end|><|endoftext|>", "[PAD]", [], [None, [math.nan]]]
)
def test_nothing_is_no_text(value: object) -> None:
    assert texts_in(value, "x") == ()


@pytest.mark.parametrize("value", [True, {}, math.inf, b"x", object()])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(BadField, match="x "):
        texts_in(value, "x")


@pytest.mark.parametrize(("value", "what"), [(None, "null"), (math.nan, "NaN"), ("</s>", "a special token"), (" ", "empty"), ([], "empty")])
def test_an_absent_target_says_what_stands_there(value: object, what: str) -> None:
    with pytest.raises(BadField, match=f"target is {what}"):
        text_at({"target": value}, "target")


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_read_back_as_itself(value: float) -> None:
    assert float(texts_in(value, "x")[0]) == value


def test_special_tokens_and_nan_are_no_old_answers(tmp_path: Path) -> None:
    s = stream(tmp_path, [record(i, previous="<|endoftext|>" if i % 2 else math.nan) for i in range(N)])
    assert passed_over(s) == {"previous holds NaN, a blank or a special token: no old answer": N}
    assert not questions(s, "stale")


def test_class_labels_dates_and_float_years_of_a_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": f"P {i}", "target": i % 3, "previous": float(1990 + i), "extra": i} for i in range(40)]
    table = datasets.Dataset.from_list(rows).cast_column("target", datasets.ClassLabel(names=["red", "green", "blue"]))
    table.save_to_disk(str(tmp_path / "labels"))
    s = STREAMS.get(f"hub:{tmp_path / 'labels'}")(StreamConfig())
    assert {e.target for e in s.events(N) if e.kind == "add"} == {"red", "green", "blue"}
    assert {e.previous for e in s.events(N) if e.kind == "add"} <= {str(1990 + i) for i in range(40)}
    assert any("not read: extra" in note for note in s.notes(s.events(N)))
    datasets.Dataset.from_list([{**r, "target": datetime(2000 + i, 1, 1)} for i, r in enumerate(rows)]).save_to_disk(
        str(tmp_path / "dates")
    )
    dates = STREAMS.get(f"hub:{tmp_path / 'dates'}")(StreamConfig())
    assert {e.target for e in dates.events(N) if e.kind == "add"} <= {f"{2000 + i}-01-01" for i in range(40)}
    assert dates.data_hash() != s.data_hash()


def test_a_split_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"prompt": f"P {i}", "target": f"t {i}"} for i in range(40)])
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "dev": table.select(range(10))}).save_to_disk(str(tmp_path / "dict"))
    (tmp_path / "parquet").mkdir()
    table.to_parquet(str(tmp_path / "parquet" / "train.parquet"))

    def made(name: str) -> Stream:
        return STREAMS.get(f"hub:{tmp_path}/{name}")(StreamConfig())

    assert "10 usable of 10" in made("dict::dev").origin
    assert "20 usable of 20" in made("parquet::train[:50%]").origin
    assert "40 usable of 40" in made("parquet/train.parquet").origin
    for name, message in (("one::test", "without splits"), ("dict::test", "it has train, dev"), ("one:part", "without configurations")):
        with pytest.raises(BadStream, match=message):
            made(name)


# fields ------------------------------------------------------------------------------------------------------


def test_every_record_has_its_own_fields(tmp_path: Path) -> None:
    """The first record lacks fields, and the others keep theirs."""
    rows = [{"prompt": "P", "target": "t"}, *(record(i, rephrase=f"Town {i}?", text=f"Q {i}", text_answer=f"a {i}") for i in range(N))]
    s = stream(tmp_path, rows)
    read = s.manifest()["read"]
    assert (read["facts"], read["old answers"], read["subjects"], read["locality_text"]) == (N + 1, N, N, N)
    assert read["held-out paraphrases"] == N


def test_fields_that_nobody_reads_are_named(tmp_path: Path) -> None:
    s = stream(tmp_path, [record(i, tag="x", port=1) for i in range(N)])
    assert "fields that are not read: port, tag" in s.notes(s.events(N))


@pytest.mark.parametrize(
    ("subject", "prompt", "found"),
    [
        ("Café", "The flag of Cafe\u0301 is", "Cafe\u0301"),
        ("TOWN", "The flag of town is", "town"),
        ("ﬁnland", "The flag of Finland is", "Finland"),
        ("Straße", "In STRASSE 5", "STRASSE"),
        ("own", "The flag of Town is", None),
        ("Tow", "The flag of town is", None),
        ("", "The flag", None),
    ],
)
def test_a_subject_is_found_in_another_case_or_unicode_form(subject: str, prompt: str, found: str | None) -> None:
    assert span_of(prompt, subject) == found
    assert found is None or found in prompt


@given(st.text(max_size=12), st.text(max_size=5), st.text(max_size=5))
def test_what_is_found_stands_in_the_text(wanted: str, before: str, after: str) -> None:
    text = f"{before} {wanted} {after}"
    found = span_of(text, wanted)
    assert found is None or found in text


def test_subjects_that_are_not_in_their_prompt_are_counted(tmp_path: Path) -> None:
    rows = [record(i, subject=("TOWN", "Town", "village")[i % 3] + f" {i}") for i in range(60)]
    s = stream(tmp_path, rows)
    assert passed_over(s) == {
        "the subject is in its prompt in another case or Unicode form": 40,
        "the subject is not in its prompt": 20,
    }
    assert all(e.subject in e.prompt for e in s.events(N) if e.subject and "village" not in e.subject)


NESTED: dict[str, tuple[Any, list[tuple[str, str | None]]]] = {
    "KnowEdit": ({"Reasoning": [{"prompt": "Q?", "ground_truth": [["a", "b"]]}]}, [("Q?", "a")]),
    "VLKEB": ([{"port_q": "Q?", "port_a": "a"}], [("Q?", "a")]),
    "VLKEB, wrapped": ([{"Q&A": {"Question": "Q?", "Answer": "a"}}], [("Q?", "a")]),
    "EasyEdit": ({"one_hop": {"prompt": ["Q?", "R?"], "ground_truth": [["a", "c"], "b"]}}, [("Q?", "a"), ("R?", "b")]),
    "a text in a table": ('[{"question": "Q?", "answer": "a"}]', [("Q?", "a")]),
    "nothing": ({"Reasoning": [], "other": None}, []),
}


@pytest.mark.parametrize("name", list(NESTED))
def test_portability_in_the_shapes_that_people_publish(tmp_path: Path, name: str) -> None:
    value, expected = NESTED[name]
    s = stream(tmp_path, [record(i, portability=value) for i in range(N)])
    found = questions(s, "portability")
    assert set(found) == set(expected)
    assert len(found) == len(expected) * sum(e.kind == "add" for e in s.events(N))
    assert not passed_over(s)


def test_locality_of_qaedit_is_about_unrelated_text(tmp_path: Path) -> None:
    s = stream(tmp_path, [record(i, locality=[{"loc": f"who is {i}", "loc_ans": f"p {i}"}]) for i in range(N)])
    assert len(questions(s, "locality_text")) == sum(e.kind == "add" for e in s.events(N))


def test_a_text_is_a_portability_question_with_its_own_answer(tmp_path: Path) -> None:
    rows = [{**record(i), "hop": f"Q {i}?" if i % 2 else None, "hop_a": f"a {i}" if i % 2 else None} for i in range(N)]
    s = stream(tmp_path, rows, fields=("portability=hop", "portability_answer=hop_a"))
    assert s.manifest()["read"]["portability"] == N // 2
    assert all(a == f"a {p[2:-1]}" for p, a in questions(s, "portability"))


def test_sub_fields_that_are_not_read_are_counted_or_refused(tmp_path: Path) -> None:
    port = [{"prompt": "Q?", "ground_truth": "a", "port_type": "x"}, {"prompt": "R?"}]
    s = stream(tmp_path, [record(i, portability=port if i else [{"ask": "Q?", "say": "a"}]) for i in range(N)])
    assert [(k.where, k.reason.partition(":")[0]) for k in s.skipped] == [("record 0", "portability holds ask, say")]
    assert passed_over(s) == {
        "portability: the sub-field port_type is not read": N - 1,
        "portability.prompt: a question without an answer is not asked": N - 1,
    }


def test_published_layouts_are_known_by_their_fields(tmp_path: Path) -> None:
    wiki = [
        {
            "subject": f"S{i}",
            "update": f"Land of S{i}?",
            "ans": f"n{i}",
            "rephrase": f"S{i} is in?",
            "personas": f"Ahoy, S{i}?",
            "loc": "Q?",
        }
        | {"loc_ans": "a", "mhop": f"Sea of S{i}?", "mhop_ans": f"s{i}", "tag": "t"}
        for i in range(N)
    ]
    s = stream(tmp_path, wiki)
    read = s.manifest()["read"]
    assert (read["facts"], read["portability"], read["locality_text"], read["held-out paraphrases"]) == (N, N, N, 2 * N)
    assert any(note.startswith("fields: prompt=update, target=ans") for note in s.notes(s.events(N)))
    easy = [{"prompt": f"P{i}", "target_new": f"n{i}", "ground_truth": "</s>", "rephrase_prompt": f"R{i}"} for i in range(N)]
    assert stream(tmp_path, easy).manifest()["read"]["held-out paraphrases"] == N


# questions of several edits ----------------------------------------------------------------------------------


def mquake(i: int, edits: int = 2) -> dict[str, Any]:
    rewrites = [
        {"prompt": "{} lives in", "subject": f"P{i}.{k}", "target_new": {"str": f"new {i}.{k}"}, "target_true": {"str": f"old {i}.{k}"}}
        for k in range(edits)
    ]
    return {
        "case_id": i,
        "requested_rewrite": rewrites,
        "questions": [f"Q{i}a?", f"Q{i}b?"],
        "new_answer": f"A{i}",
        "new_answer_alias": ["B"],
    }


def test_a_question_of_several_edits_is_asked_only_while_all_are_live(tmp_path: Path) -> None:
    s = stream(tmp_path, [mquake(i) for i in range(40)], revise=0.0, retire=0.2)
    events = s.events(120)
    check_order(events)
    by_id = {e.id: e for e in events}
    joint = [(e, q) for e in events for q in s.questions(e) if q.needs]
    assert joint and all(q.split == "portability" and q.golds[1] == "B" for _, q in joint)
    for e, q in joint:
        i = e.target.split()[1].split(".")[0]
        assert q.answer == f"A{i}"
        assert {by_id[n].target for n in q.needs} | {e.target} == {f"new {i}.0", f"new {i}.1"}
    planned = build(s, events, ScheduleConfig(budget=10**6))
    asked = 0
    live: set[str] = set()
    for step in planned.steps:
        for a in step.edits:
            live = live - {a.event.revises} | {a.event.id}
        for p in step.questions:
            asked += bool(p.plan.question.needs)
            assert set(p.plan.question.needs) <= live
    assert asked > 10


def test_a_question_is_left_out_and_counted_where_an_edit_cannot_be_made(tmp_path: Path) -> None:
    rows = [mquake(i) for i in range(40)]
    rows[1]["requested_rewrite"][0] = rows[0]["requested_rewrite"][0] | {"target_new": {"str": "elsewhere"}}
    rows[2]["requested_rewrite"][0] = rows[0]["requested_rewrite"][0]
    s = stream(tmp_path, rows)
    assert passed_over(s) == {"questions that follow from several edits are not asked: an edit or the answer is missing": 2}
    assert [k.where for k in s.skipped] == ["record 1 edit 0", "record 2 edit 0"]
    assert s.manifest()["read"]["portability"] == 78


def test_a_picture_without_content_is_skipped_by_name(tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(b"" if i == 3 else bytes([i]))
    s = stream(tmp_path, [record(i, image=f"{i}.png") for i in range(41)])
    assert [(k.where, k.reason) for k in s.skipped] == [("record 3", "the file for image is empty"), ("record 40", "no file for image")]
    assert s.events(10)


def test_the_command_line_says_what_was_read_and_lost(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text(
        "prompt,target,previous,note\n" + "".join(f"P {i},t {i},</s>,x\n" for i in range(40)) + "P 1,t 1,o,x\n"
    )
    lines = inspect_stream(InspectConfig(f"csv:{tmp_path / 'own.csv'}", edits=50))
    for expected in (
        "fields that are not read: note",
        "40 x previous holds NaN, a blank or a special token: no old answer",
        "skipped: 1 x the same question stands in an earlier record",
    ):
        assert expected in lines
    assert any(line.startswith("read: 40 facts, 0 old answers") for line in lines)
