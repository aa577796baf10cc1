"""Several orders of one stream: which folders may be pooled, what the pooled numbers are, what they cover."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.metrics import curves, orders
from analysis.metrics.bootstrap import Draws
from analysis.metrics.summary import summarise
from analysis.reading.records import BadRun
from analysis.reporting.report import write_all
from tests.helpers.fake_run import Plan, event, fake_run, question, record, write_run

FEW = 50


def order(out: Path, seed: int, right: int, **manifest: object) -> Path:
    """Four edits of which `right` are right at the end."""
    events = [event(i, i + 1, subject=f"s{i}") for i in range(4)]
    questions = [question(f"e{i}-edit", f"e{i}") for i in range(4)]
    scored = [{"token_hits": int(i < right), "n_tokens": 1, "exact": i < right} for i in range(4)]
    rows = [record(edit_id=f"e{i}", question_id=f"e{i}-edit", probe_step=4, **s) for i, s in enumerate(scored)]
    given = {"seed": seed, "schedule_hash": f"s{seed}", "config": {"seed": seed, "batch": 1}} | manifest
    return write_run(out, events, questions, {"e": rows, "f": rows}, **given)


def entry(paths: list[Path], name: str = "edit_success") -> dict:
    return summarise(orders.load_orders(paths), replicates=FEW)["editors"]["e"][name]


def draws(value: float, noise: float, seed: int) -> Draws:
    replicates = value + noise * np.random.default_rng(seed).standard_normal(4000)
    return Draws(np.concatenate([[value], replicates]), 10, np.arange(10), 1000.0)


def test_values_are_means_over_orders_with_the_spread_beside(tmp_path: Path) -> None:
    result = entry([order(tmp_path / str(s), s, r) for s, r in enumerate((1, 2, 4))])
    assert result["value"] == pytest.approx(np.mean([0.25, 0.5, 1.0]))
    assert result["sd"] == pytest.approx(np.std([0.25, 0.5, 1.0], ddof=1))
    assert (result["n"], result["questions"]) == (12, 4), "the same four questions in each order"
    assert (result["low"], result["high"]) == (None, None)


def test_the_interval_is_students_where_orders_differ_and_that_of_the_subjects_where_they_agree_by_chance() -> None:
    apart = orders.mean_over_orders([draws(v, 0.001, i) for i, v in enumerate((0.4, 0.5, 0.6))])
    assert (apart["high"] - apart["low"]) / 2 == pytest.approx(4.3027 * 0.1 / np.sqrt(3), rel=1e-3)
    alike = orders.mean_over_orders([draws(0.5, 0.06, i) for i in range(3)])
    assert (alike["high"] - alike["low"]) / 2 == pytest.approx(1.96 * 0.06 / np.sqrt(3), rel=0.05)


def test_two_orders_have_no_interval_and_one_says_that_it_is_alone(tmp_path: Path) -> None:
    two = orders.mean_over_orders([draws(v, 0.01, i) for i, v in enumerate((0.3, 0.6))])
    assert (two["value"], two["low"], two["high"]) == (pytest.approx(0.45), None, None)
    assert two["sd"] == pytest.approx(np.std([0.3, 0.6], ddof=1))
    runs = orders.load_orders([order(tmp_path / str(s), s, 2) for s in range(2)])
    assert any("there are no intervals, which need 3 orders" in n for n in summarise(runs, replicates=FEW)["run"]["notes"])
    one = summarise(runs[:1], replicates=FEW)["run"]["notes"]
    assert any("of this order only" in n and "not another order or seed" in n for n in one)


@pytest.mark.parametrize("between", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("many", [2, 3, 5])
def test_pooled_intervals_cover_the_truth_over_orders_or_are_absent(many: int, between: float) -> None:
    rng, hits = np.random.default_rng(3), 0
    for _ in range(400):
        result = orders.mean_over_orders([draws(0.5 + rng.normal(0, between) + rng.normal(0, 0.03), 0.03, 1) for _ in range(many)])
        if many < orders.LEAST_ORDERS:
            assert result["low"] is result["high"] is None
        else:
            hits += result["low"] <= 0.5 <= result["high"]
    assert many < orders.LEAST_ORDERS or hits / 400 > 0.93


def test_what_happens_in_some_orders_only_says_in_how_many() -> None:
    points = [{"value": 50.0, "low": 40.0, "high": 50.0, "n": 5}, {"value": 70.0, "low": 60.0, "high": 70.0, "n": 5}]
    result = orders.mean_and_range(points, 3)
    assert (result["value"], result["low"], result["high"], result["orders"]) == (60.0, 40.0, 70.0, 2)


def test_pairs_are_differences_within_an_order(tmp_path: Path) -> None:
    runs = orders.load_orders([order(tmp_path / str(s), s, r) for s, r in enumerate((1, 2, 4))])
    assert summarise(runs, replicates=FEW)["pairs"]["e - f"]["edit_success"]["value"] == 0.0
    assert summarise(runs, replicates=FEW)["pairs"]["e - f"]["edit_success"]["sd"] == 0.0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"config": {"seed": 1, "batch": 8}}, "differ in more than their seed.*batch: 1 / 8"),
        ({"model_hash": "other"}, 'differ in more than their seed.*model_hash: null / "other"'),
        ({"number": 0, "schedule_hash": "other"}, "different schedules"),
        ({"schema_version": 1}, None),
    ],
)
def test_folders_that_differ_otherwise_are_refused_with_the_difference(tmp_path: Path, changed: dict, words: str | None) -> None:
    paths = [order(tmp_path / "a", 0, 1), order(tmp_path / "b", changed.pop("number", 1), 1, **changed)]
    if words is None:
        assert len(orders.load_orders(paths)) == 2
        return
    with pytest.raises(BadRun, match=words):
        orders.load_orders(paths)


def test_editors_that_some_order_lacks_are_left_out_with_a_note(tmp_path: Path) -> None:
    a, b = order(tmp_path / "a", 0, 1), order(tmp_path / "b", 1, 1)
    manifest = json.loads((b / "manifest.json").read_text())
    (b / "manifest.json").write_text(json.dumps(manifest | {"editors": ["e"]}))
    runs = orders.load_orders([a, b])
    assert [list(r.editors) for r in runs] == [["e"], ["e"]]
    assert "f: not in every order, left out" in runs[0].notes
    (b / "manifest.json").write_text(json.dumps(manifest | {"editors": ["f"]}))
    (a / "manifest.json").write_text(json.dumps(json.loads((a / "manifest.json").read_text()) | {"editors": ["e"]}))
    with pytest.raises(BadRun, match="no editor is in every order"):
        orders.load_orders([a, b])


def test_curves_of_orders_are_averaged_where_all_are_known() -> None:
    tables = [
        pd.DataFrame({"x": [0.0, 10, 20 + k], "value": [1.0, 0.5, v], "low": 0.0, "high": 1.0, "n": 4.0, "questions": 3.0})
        for k, v in enumerate((0.2, 0.4))
    ]
    result = curves.average(tables)
    assert result["x"].tolist() == [0, 10, 20]
    assert result["value"].tolist() == pytest.approx([1.0, 0.5, (0.2 + (0.5 + (0.4 - 0.5) * 10 / 11)) / 2])
    assert result["n"].tolist() == [8, 8, 8]
    assert result["questions"].tolist() == [3, 3, 3]
    assert result["low"].isna().all(), "two orders have no interval"
    assert curves.average([tables[0]]) is tables[0]


@pytest.mark.ci
def test_three_folders_make_one_report(tmp_path: Path) -> None:
    plan = {"edits": 24, "years": 3, "editors": ("noop", "finetune"), "panel": 8}
    paths = [fake_run(tmp_path / f"r{s}", Plan(seed=s, **plan), seed=s, schedule_hash=f"s{s}") for s in range(3)]
    summary = write_all(paths, formats=(), replicates=20)
    assert summary["run"]["seeds"] == [0, 1, 2]
    assert "sd" in summary["editors"]["finetune"]["edit_success"]
    page = (paths[0] / "comparison" / "report.html").read_text("utf-8")
    assert "3 (seeds 0, 1, 2)" in page
    assert "sd " in page
    seeds = pd.read_csv(paths[0] / "comparison" / "tables" / "forgetting.csv")["seed"]
    assert set(seeds) == {0, 1, 2}
