"""Metrics of edits over time against values computed by hand: matrix, survival, stability, revised facts, ladder, roles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.metrics import curves
from analysis.metrics.bootstrap import Resampler
from analysis.metrics.forgetting import answers_by_age
from analysis.metrics.summary import summarise
from analysis.reading.load import Run, load_run
from analysis.reading.records import TOKEN_ACCURACY
from tests.helpers.fake_run import event, question, record, write_run

FEW = 100


def ask(edit: int, step: int, right: float, **more: object) -> dict:
    given = {"probe_time": (step - 1) / 2, "split": "edit"} | more
    scored = {"token_hits": int(2 * right), "n_tokens": 2, "logprob": -1.0, "exact": right == 1}
    return record(edit_id=f"e{edit}", question_id=f"e{edit}-{given['split']}", probe_step=step, **scored, **given)


def now(edit: int, right: float) -> dict:
    return ask(edit, edit + 1, right, probe="right_after")


def ladder_answer(edit: int, step: int, right: float) -> dict:
    return ask(edit, step, right, probe="ladder", panel="cohort_ladder", incl_prob=0.1)


def run_of(out: Path, rows: list[dict], edits: int = 6, **changed: dict) -> Run:
    """Edits one a step, two a year."""
    events = [event(i, i + 1, time=i / 2, subject=f"s{i}", **changed.get(f"e{i}", {})) for i in range(edits)]
    questions = [question(f"e{i}-{s}", f"e{i}", s) for i in range(edits) for s in ("edit", "stale")]
    return load_run(write_run(out, events, questions, {"e": rows}))


def values(run: Run) -> dict[str, float]:
    return {k: v["value"] for k, v in summarise(run, replicates=FEW)["editors"]["e"].items()}


def curve(run: Run, make, **given: object):
    return make(run, run.editors["e"], Resampler(run.clusters, np.random.default_rng(0), FEW), **given)


def test_the_matrix_of_years_made_by_years_asked(tmp_path: Path) -> None:
    rows = [ask(0, 2, 1), ask(1, 2, 0), ask(0, 4, 0), ask(1, 4, 0), ask(2, 4, 1), ask(0, 6, 0.5), ask(3, 6, 1), ask(4, 6, 1)]
    result = curve(run_of(tmp_path, rows), curves.matrix, mode=TOKEN_ACCURACY)
    assert {(r.made, r.x): r.value for r in result.itertuples()} == {
        (1, 1): 0.5, (1, 2): 0.0, (2, 2): 1.0, (1, 3): 0.5, (2, 3): 1.0, (3, 3): 1.0,
    }  # fmt: skip


def test_anytime_success_is_the_mean_of_the_year_ends(tmp_path: Path) -> None:
    rows = [ask(0, 2, 1), ask(0, 4, 0), ask(2, 4, 1), ask(4, 6, 0)]
    assert values(run_of(tmp_path, rows))["anytime_success"] == pytest.approx((1 + 0.5 + 0) / 3)


def test_plasticity_is_of_the_last_year_and_stability_of_edits_once_right(tmp_path: Path) -> None:
    rows = [now(0, 1), now(1, 0), now(2, 1), now(3, 1), now(4, 1), now(5, 0)]
    rows += [ask(0, 6, 0), ask(1, 6, 0), ask(2, 6, 1), ask(3, 6, 1), ask(4, 6, 1)]
    got = values(run_of(tmp_path, rows))
    assert got["plasticity"] == pytest.approx(1 / 2)
    assert got["stability"] == pytest.approx(2 / 3)
    assert got["stability_plasticity"] == pytest.approx(2 * (1 / 2) * (2 / 3) / (1 / 2 + 2 / 3))


def test_one_year_has_no_stability(tmp_path: Path) -> None:
    got = values(run_of(tmp_path, [now(0, 1), now(1, 1), ask(0, 2, 1), ask(1, 2, 1)], edits=2))
    assert got["plasticity"] == 1.0
    assert "stability" not in got


def test_revised_facts_are_judged_by_the_current_value_with_stale_answers_beside(tmp_path: Path) -> None:
    rows = [ask(0, 6, 0), ask(2, 6, 1), ask(3, 6, 0), ask(4, 6, 1), ask(2, 6, 0, split="stale"), ask(4, 6, 1, split="stale")]
    revised = {"e0": {"superseded_step": 3}, "e2": {"kind": "revise", "revises": "e0"}, "e3": {"kind": "revert", "revises": "e1"}}
    got = values(run_of(tmp_path, rows, **revised))
    assert got["revised_success"] == 0.5
    assert got["revised_stale"] == 0.0
    assert got["stale_rate"] == 0.5


def test_the_gap_compares_two_scoring_modes_of_the_same_answers(tmp_path: Path) -> None:
    rows = [ask(0, 6, 1) | {"exact": False}, ask(1, 6, 1), ask(2, 6, 0.5), ask(3, 6, 1) | {"exact": None}]
    assert values(run_of(tmp_path, rows))["teacher_forcing_gap"] == pytest.approx((1 + 0 + 0.5) / 3)


def test_survival_is_the_product_limit_over_the_ladder(tmp_path: Path) -> None:
    firsts = [now(i, 1) for i in range(5)]
    at_one = [ladder_answer(0, 2, 1), ladder_answer(1, 3, 1), ladder_answer(2, 4, 0), ladder_answer(3, 5, 1)]
    at_two = [ladder_answer(0, 3, 1), ladder_answer(1, 4, 0), ladder_answer(2, 5, 1), ladder_answer(3, 6, 1)]
    run = run_of(tmp_path, [*firsts, *at_one, *at_two, ladder_answer(0, 5, 1)], e3={"superseded_step": 6})
    result = curve(run, curves.survival, mode=TOKEN_ACCURACY)
    assert result["x"].tolist() == [curves.RIGHT_AFTER_AGE, 1, 2, 4]
    assert result["value"].tolist() == pytest.approx([1, 3 / 4, 3 / 4 * 1 / 2, 3 / 4 * 1 / 2])


def test_an_edit_that_was_never_right_does_not_count_for_survival(tmp_path: Path) -> None:
    run = run_of(tmp_path, [now(0, 0), now(1, 1), ladder_answer(0, 2, 0), ladder_answer(1, 3, 1)])
    assert curve(run, curves.survival, mode=TOKEN_ACCURACY)["value"].tolist() == [1.0, 1.0]


def test_the_ladder_serves_ages_and_no_mean_over_live_edits(tmp_path: Path) -> None:
    run = run_of(tmp_path, [ask(0, 6, 1), ladder_answer(1, 6, 0), ladder_answer(2, 6, 0)])
    assert values(run)["edit_success"] == 1.0
    assert set(run.editors["e"].records["role"]) == {0, 2}


def test_a_question_that_panel_and_ladder_both_ask_counts_for_each_and_once_by_age(tmp_path: Path) -> None:
    rows = (
        [now(i, 1) for i in range(6)]
        + [ask(0, 6, 1, incl_prob=0.05), ladder_answer(0, 6, 1)]
        + [ladder_answer(i, 6, 0) for i in (1, 2, 3, 4)]
    )
    run = run_of(tmp_path, rows)
    assert values(run)["edit_success"] == 1.0
    assert len(answers_by_age(run.editors["e"].records)) == 5


@pytest.mark.parametrize(
    ("panel", "topic"),
    [("rotating_fresh", "facts"), ("fixed_unrelated", "facts"), ("fixed_general", "bench:quiz"), ("fixed_general", "safety:refusal")],
)
def test_other_panels_do_not_count_for_general_ability(tmp_path: Path, panel: str, topic: str) -> None:
    events, questions = [event(0, 1)], [question("g", None, "general", topic="facts"), question("o", None, "general", topic=topic)]
    scored = {"split": "general", "probe": "general", "n_tokens": 1, "logprob": -1.0}
    rows = [record(question_id="g", token_hits=1, exact=True, topic="facts", **scored)]
    rows += [record(question_id="o", token_hits=0, exact=False, topic=topic, panel=panel, **scored)]
    assert values(load_run(write_run(tmp_path, events, questions, {"e": rows})))["general_score"] == 1.0


def test_drops_of_a_group_are_means_over_its_topics(tmp_path: Path) -> None:
    names = ["bench:a"] * 3 + ["bench:b"]
    questions = [question(f"q{i}", None, "general", topic=t) for i, t in enumerate(names)]
    scored = {"split": "general", "probe": "benchmark", "n_tokens": 1, "logprob": -1.0}
    rows = [record(question_id=f"q{i}", topic=t, token_hits=int(i in (0, 3)), exact=i in (0, 3), **scored) for i, t in enumerate(names)]
    base = [{"question_id": f"q{i}", "token_hits": 1, "n_tokens": 1, "logprob": -0.1, "exact": True} for i in range(4)]
    got = values(load_run(write_run(tmp_path, [event(0, 1)], questions, {"e": rows}, base)))
    assert got["benchmark_drop"] == pytest.approx((2 / 3 + 0) / 2)
    assert "safety_drop" not in got


hits = st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=6, max_size=6)


@settings(max_examples=15, deadline=None)
@given(first=hits, last=hits)
def test_properties_of_any_answers(tmp_path_factory: pytest.TempPathFactory, first: list[float], last: list[float]) -> None:
    rows = (
        [now(i, h) for i, h in enumerate(first)]
        + [ladder_answer(i, i + 2, h) for i, h in enumerate(last)]
        + [ask(i, 6, h) for i, h in enumerate(last)]
    )
    run = run_of(tmp_path_factory.mktemp("properties"), rows)
    shuffled = run_of(tmp_path_factory.mktemp("properties"), rows[::-1])
    got = values(run)
    assert got == values(shuffled)
    for name in ("anytime_success", "plasticity", "stability", "stability_plasticity"):
        assert 0 <= got.get(name, 0) <= 1
    if {"plasticity", "stability", "stability_plasticity"} <= set(got):
        low, high = sorted((got["plasticity"], got["stability"]))
        assert low - 1e-9 <= got["stability_plasticity"] <= high + 1e-9
    kept = curve(run, curves.survival, mode=TOKEN_ACCURACY)["value"].to_numpy()
    assert (np.diff(kept) <= 1e-12).all()
    assert ((kept >= 0) & (kept <= 1)).all()
