"""Retrieval logs judged against the events: hand-computed ranks, errors, shares."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from analysis.figures import catalogue
from analysis.figures.context import figure_context
from analysis.metrics.retrieval import by_facts, judged, retrieval_logs, table
from analysis.metrics.summary import summarise
from analysis.reading.load import load_run
from testbed.core.schema import Record
from tests.helpers.fake_run import event, question, record, write_rows, write_run

EVENTS = pd.DataFrame(
    [("a1", "add", 1, None, 3.0), ("b1", "add", 2, None, 4.0), ("a2", "revise", 3, "a1", None), ("b2", "retire", 4, "b1", None)],
    columns=["edit_id", "kind", "step", "revises", "superseded_step"],
)


def answer(split: str, edit: str | None, step: int, right: bool, retrieved: list[str], used: list[str], **more: Any) -> dict[str, Any]:
    extras = {"retrieved": retrieved, "used": used, "added_tokens": 10, "gate_tokens": 5, "dropped": 1}
    return record(split=split, edit_id=edit, probe_step=step, exact=right, generated="x", extras=json.dumps(extras), **more)


ANSWERS = [
    answer("edit", "a1", 2, True, ["b1", "a1"], ["a1"]),
    answer("edit", "a1", 2, False, ["b1"], []),
    answer("text_generality", "a1", 2, False, ["a1", "b1"], []),
    answer("edit", "b1", 2, False, ["a1", "b1"], ["a1"]),
    answer("edit", "b1", 2, False, ["b1"], ["b1"]),
    answer("locality_far", "b1", 2, True, ["a1"], ["a1"]),
    answer("general", None, 2, True, ["a1"], []),
    answer("edit", "a1", 3, True, ["a2"], ["a2"]),
    answer("stale", "a1", 2, False, ["a1"], ["a1"]),
    record(split="text", exact=None),
    record(split="edit", edit_id="a1", exact=True),
]


@pytest.fixture
def rows(tmp_path) -> pd.DataFrame:
    write_rows(tmp_path / "records" / "step-000003.parquet", Record, ANSWERS)
    return retrieval_logs(tmp_path)


def test_only_answers_with_a_retrieval_log_are_read(rows):
    assert len(rows) == 9
    assert len(judged(rows, EVENTS)) == 8
    assert set(rows["tokens"]) == {15}


def test_the_bearing_fact_is_the_newest_version_and_none_after_a_retirement(tmp_path):
    questions = [("a1", 2, ["a1"]), ("a1", 3, ["a1"]), ("a1", 3, ["a2"]), ("b1", 3, ["b1"]), ("b1", 4, ["b1"]), ("b2", 4, ["b1"])]
    answers = [answer("edit", e, step, True, retrieved, []) for e, step, retrieved in questions]
    write_rows(tmp_path / "records" / "step-000004.parquet", Record, answers)
    result = judged(retrieval_logs(tmp_path), EVENTS)
    assert result["rank"].tolist() == [1, 0, 1, 1, 0, 0]
    assert result["bears"].tolist() == [True] * 4 + [False] * 2
    assert result["facts"].tolist() == [2, 2, 2, 2, 1, 1]


def test_no_fact_bears_on_an_edit_still_to_come(tmp_path):
    write_rows(tmp_path / "records" / "step-000001.parquet", Record, [answer("edit", "b1", 1, False, ["a1"], ["a1"])])
    result = judged(retrieval_logs(tmp_path), EVENTS)
    assert (result["bears"].tolist(), result["error"].tolist()) == ([False], [""])
    assert by_facts(result).iloc[0]["false_accept"] == 1


def test_ranks_and_the_four_errors(rows):
    result = judged(rows, EVENTS)
    assert result["rank"].tolist() == [2, 0, 1, 2, 1, 0, 0, 1]
    assert result["error"].tolist() == ["", "miss", "reject", "wrong", "ignored", "", "", ""]
    assert result["facts"].tolist() == [2] * 8
    assert result["bears"].tolist() == [True] * 5 + [False] * 2 + [True]


def test_shares_by_number_of_facts(rows):
    table = by_facts(judged(rows, EVENTS))
    assert len(table) == 1
    row = table.iloc[0]
    assert (row["facts_from"], row["facts_to"], row["questions"]) == (2, 3, 8)
    assert row["hit_rate"] == pytest.approx(5 / 6)
    assert row["reciprocal_rank"] == pytest.approx((0.5 + 0 + 1 + 0.5 + 1 + 1) / 6)
    assert row["scope_recall"] == pytest.approx(3 / 6)
    assert row["scope_precision"] == pytest.approx(3 / 5)
    assert row["false_accept"] == pytest.approx(1 / 2)
    assert [row[e] for e in ("miss", "reject", "wrong", "ignored")] == pytest.approx([1 / 6] * 4)


def test_shares_are_weighted_by_one_over_the_inclusion_probability(tmp_path):
    drawn = [answer("edit", "a1", 1, True, ["a1"], ["a1"], incl_prob=0.25), answer("edit", "a1", 1, True, [], [])]
    write_rows(tmp_path / "records" / "step-000001.parquet", Record, drawn)
    assert by_facts(judged(retrieval_logs(tmp_path), EVENTS)).iloc[0]["hit_rate"] == pytest.approx(4 / 5)


def test_an_editor_without_retrieval_logs_has_no_rows(tmp_path):
    write_rows(tmp_path / "records" / "step-000001.parquet", Record, [record(exact=True)])
    assert len(retrieval_logs(tmp_path)) == 0
    assert len(by_facts(judged(retrieval_logs(tmp_path), EVENTS))) == 0


def test_the_table_names_the_order_and_the_editors_that_have_retrieval_logs(tmp_path):
    write_rows(tmp_path / "a" / "records" / "step-000003.parquet", Record, ANSWERS)
    write_rows(tmp_path / "b" / "records" / "step-000003.parquet", Record, [record(exact=True)])
    editors = {name: SimpleNamespace(folder=tmp_path / name) for name in "ab"}
    run: Any = SimpleNamespace(manifest={"seed": 3}, events=EVENTS, editors=editors)
    result = table([run])
    assert result[["seed", "editor", "questions"]].values.tolist() == [[3, "a", 8]]
    assert table([SimpleNamespace(manifest={}, events=EVENTS, editors={"b": editors["b"]})]).empty  # type: ignore[list-item]


SPLITS = ("edit", "locality_far", "locality_hard", "locality_text")


@pytest.mark.ci
@pytest.mark.parametrize(("kinds", "precision", "accepted"), [(4, 0.125, [(1.0,)]), (2, 0.25, [])])
def test_the_figure_shows_retrieved_facts_and_their_cost(tmp_path, kinds, precision, accepted):
    """Six questions that no fact bears on are shown, two are too few."""
    events = [event(i, i + 1, time=float(i + 1), subject=f"s{i}") for i in range(2)]
    questions = [question(f"{i}-{s}", f"e{i}", s) for i in range(2) for s in SPLITS]
    log = json.dumps({"retrieved": ["e1"], "used": ["e1"], "added_tokens": 10, "gate_tokens": 5, "dropped": 0})
    answers = [
        record(editor="store", probe_step=2, question_id=f"{i}-{s}", edit_id=f"e{i}", edit_step=i + 1, split=s, exact=True, extras=log)
        | {"generated": "x", "seconds": 0.02}
        for i in range(2)
        for s in SPLITS[:kinds]
    ]
    plain = [record(editor="weights", probe_step=2, question_id="0-edit", edit_id="e0", edit_step=1, exact=True)]
    run = load_run(write_run(tmp_path, events, questions, {"store": answers, "weights": plain}))
    figure = catalogue.draw_all(figure_context(run, summarise(run)))["retrieved"]
    shown = {ax.get_title(loc="left"): [tuple(line.get_ydata()) for line in ax.lines if len(line.get_ydata())] for ax in figure.axes}
    assert shown == {
        "Bearing fact found": [(0.5,)],
        "Bearing fact given": [(0.5,)],
        "Given facts that bear": [(precision,)],
        "Given a fact for nothing": accepted,
        "Tokens added a question": [(15.0,)],
        "Milliseconds a question": [(20.0,)],
    }
    del run.editors["store"]
    assert "retrieved" not in catalogue.draw_all(figure_context(run, summarise(run)))
