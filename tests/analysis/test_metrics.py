"""Every metric against values computed by hand, and properties that hold for any answers."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.metrics.ability import chance_scores
from analysis.metrics.answers import in_common
from analysis.metrics.catalogue import METRICS, metric_of
from analysis.metrics.summary import merged_notes, summarise
from analysis.reading.load import Run, load_run
from tests.helpers.fake_run import EDITORS, Plan, event, fake_run, question, record, write_run
from tests.helpers.small_runs import FEW, answer, ask, now, small, values


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load_run(fake_run(tmp_path_factory.mktemp("fake"), Plan(edits=60, years=5, panel=24)))


@pytest.fixture(scope="module")
def fake_summary(fake: Run) -> dict:
    return summarise(fake, replicates=FEW)


def test_edit_success_is_the_mean_over_live_edits_at_the_last_step(tmp_path: Path) -> None:
    rows = [ask(0, 2, 2), ask(1, 4, 1), ask(2, 4, 2), ask(3, 4, 0)]
    got = values(small(tmp_path, rows))
    assert got["edit_success"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert got["edit_success_exact"] == got["edit_success_gen"] == pytest.approx(1 / 3)


def test_the_three_scoring_modes_are_kept_apart(tmp_path: Path) -> None:
    rows = [ask(0, 4, 1) | {"exact": True}, ask(1, 4, 2) | {"exact": None}]
    got = values(small(tmp_path, rows))
    assert (got["edit_success"], got["edit_success_exact"], got["edit_success_gen"]) == (0.75, 0.5, 1.0)


def test_superseded_edits_leave_the_count_at_the_step_that_replaces_them(tmp_path: Path) -> None:
    rows = [ask(0, 4, 0), ask(1, 4, 2), ask(0, 2, 2)]
    assert values(small(tmp_path / "a", rows, e0={"superseded_step": 4}))["edit_success"] == 1.0
    assert values(small(tmp_path / "b", rows, e0={"superseded_step": 5}))["edit_success"] == 0.5


def test_locality_counts_superseded_edits_too(tmp_path: Path) -> None:
    rows = [ask(0, 4, 0, "locality_hard"), ask(1, 4, 2, "locality_hard")]
    assert values(small(tmp_path, rows, e0={"superseded_step": 3}))["locality_hard"] == 0.5


def test_answers_are_weighted_by_one_over_their_chance_to_be_asked(tmp_path: Path) -> None:
    rows = [ask(0, 4, 2, incl_prob=0.25), ask(1, 4, 0, incl_prob=1.0)]
    assert values(small(tmp_path, rows))["edit_success"] == pytest.approx(4 / 5)


def test_forgetting_is_right_after_minus_end_and_transfer_its_negative(tmp_path: Path) -> None:
    rows = [now(0, 2), now(1, 2), now(2, 1), now(3, 2), ask(0, 4, 0), ask(1, 4, 1), ask(2, 4, 2), ask(3, 4, 2)]
    got = values(small(tmp_path, rows))
    assert got["forgetting"] == pytest.approx((1 + 0.5 - 0.5) / 3)
    assert got["backward_transfer"] == pytest.approx(-got["forgetting"])
    assert got["edit_success_now"] == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    first_edits = np.mean([1, 1, 0.5])
    last_edits = np.mean([0, 0.5, 1])
    assert last_edits == pytest.approx(first_edits + got["backward_transfer"])


def test_forgetting_max_takes_the_best_year_end_of_each_cohort(tmp_path: Path) -> None:
    year_one = [ask(0, 2, 1), ask(1, 2, 2)]
    end = [ask(0, 4, 0), ask(1, 4, 1), ask(2, 4, 2)]
    got = values(small(tmp_path, [*year_one, *end]))
    assert got["forgetting_max"] == pytest.approx(((0.5 - 0) + (1 - 0.5)) / 2)


def test_forward_transfer_compares_with_the_unedited_model(tmp_path: Path) -> None:
    base = [{"question_id": "e2-edit", "answer": "yes", "token_hits": 0, "n_tokens": 2, "logprob": -2.0, "exact": False}]
    got = values(small(tmp_path / "a", [ask(2, 1, 0), ask(2, 2, 1), ask(0, 4, 2)], base))
    assert got["forward_transfer"] == pytest.approx(0.5)
    assert "forward_transfer" not in values(small(tmp_path / "b", [ask(0, 4, 2)], base))


def test_harmonic_means_need_generality_and_locality_and_the_papers_all_three(tmp_path: Path) -> None:
    two = [ask(0, 4, 2, "text_generality"), ask(0, 4, 1, "image_generality")]
    assert not {"harmonic_mean", "harmonic_mean_published"} & set(values(small(tmp_path / "a", two)))
    three = values(small(tmp_path / "b", [*two, ask(0, 4, 1, "locality_hard")]))
    assert three["harmonic_mean"] == three["harmonic_mean_published"] == pytest.approx(3 / (1 + 2 + 2))
    assert three["harmonic_mean_exact"] == 0.0
    sibling = values(small(tmp_path / "c", [*two, ask(0, 4, 1, "locality_sibling")]))
    assert sibling["harmonic_mean"] == pytest.approx(3 / (1 + 2 + 2))
    assert "harmonic_mean_published" not in sibling
    four = values(small(tmp_path / "d", [*two, ask(0, 4, 1, "locality_hard"), ask(1, 4, 1, "locality_sibling")]))
    assert four["harmonic_mean"] == pytest.approx(4 / (1 + 2 + 2 + 2))
    assert four["harmonic_mean_published"] == pytest.approx(3 / (1 + 2 + 2))


def test_the_weakest_kind_is_named(tmp_path: Path) -> None:
    rows = [ask(0, 4, 2, "text_generality"), ask(0, 4, 2, "locality_hard"), ask(0, 4, 1, "locality_sibling")]
    entry = summarise(small(tmp_path, rows), replicates=FEW)["editors"]["e"]["weakest"]
    assert (entry["value"], entry["kind"]) == (0.5, "other questions about what was edited")


def test_general_drop_and_perplexity_are_paired_with_the_unedited_model(tmp_path: Path) -> None:
    general = [record(question_id=f"g{i}", split="general", probe="general", probe_step=4, **answer(h)) for i, h in enumerate((0, 1))]
    text = {"split": "text", "probe": "general", "probe_step": 4}
    texts = [record(question_id=f"x{i}", n_tokens=n, logprob=p, **text) for i, (n, p) in enumerate([(10, -30.0), (30, -50.0)])]
    base = [{"question_id": f"g{i}", "token_hits": 2, "n_tokens": 2, "logprob": 0.0, "exact": True} for i in range(2)]
    base += [{"question_id": f"x{i}", "n_tokens": n, "logprob": p} for i, (n, p) in enumerate([(10, -20.0), (30, -40.0)])]
    got = values(small(tmp_path, [*general, *texts], base))
    assert got["general_score"] == pytest.approx(0.25)
    assert got["general_drop"] == pytest.approx(0.75)
    assert got["perplexity_ratio"] == pytest.approx(math.exp(80 / 40 - 60 / 40))


def test_a_broken_model_has_no_perplexity_but_a_collapse_and_a_note(tmp_path: Path) -> None:
    text = {"split": "text", "probe": "general", "n_tokens": 10, "question_id": "x0"}
    rows = [record(probe_step=s, logprob=p, **text) for s, p in ((1, -20.0), (2, float("nan")), (4, float("nan")))]
    run = small(tmp_path, rows, [{"question_id": "x0", "n_tokens": 10, "logprob": -20.0}])
    summary = summarise(run, replicates=FEW)
    assert summary["editors"]["e"]["perplexity_ratio"] == {"value": None, "low": None, "high": None, "n": 1, "kind": "not finite"}
    assert summary["editors"]["e"]["collapse_edits"] == {"value": 2.0, "low": 1.0, "high": 2.0, "n": 3}
    assert summary["editors"]["e"]["collapse_step"] == {"value": 2.0, "low": 1.0, "high": 2.0, "n": 3}
    assert any("not finite" in n for n in summary["run"]["notes"])


@pytest.mark.parametrize(
    ("shifts", "expected"), [((0, 0.8, 0.8), 2.0), ((0.8, 0, 0.8), None), ((0, 0, 0.8), None), ((0.6, 0.6, 0.6), None)]
)
def test_collapse_needs_two_marked_checkpoints_in_a_row(tmp_path: Path, shifts: tuple, expected: float | None) -> None:
    text = {"split": "text", "probe": "general", "n_tokens": 10, "question_id": "x0"}
    rows = [record(probe_step=s, logprob=-20.0 - 10 * d, **text) for s, d in zip((1, 2, 4), shifts)]
    run = small(tmp_path, rows, [{"question_id": "x0", "n_tokens": 10, "logprob": -20.0}])
    got = values(run)
    assert got["collapse_step"] == got["collapse_edits"] == expected
    unconfirmed = summarise(run, replicates=FEW)["editors"]["e"].get("collapse_unconfirmed")
    assert unconfirmed == ({"value": 4.0, "low": 2.0, "high": 4.0, "n": 3} if expected is None and shifts[-1] > 0.7 else None)


def test_collapse_is_counted_in_edits_too_so_that_batch_sizes_compare(tmp_path: Path) -> None:
    events = [event(i, 1 + i // 10) for i in range(40)]
    text = {"split": "text", "probe": "general", "n_tokens": 10, "question_id": "x"}
    rows = [record(probe_step=s, logprob=-20.0 - 10 * (s > 1), **text) for s in (1, 2, 4)]
    base = [{"question_id": "x", "n_tokens": 10, "logprob": -20.0}]
    run = load_run(write_run(tmp_path, events, [question("x", None, "text")], {"e": rows}, base))
    entries = summarise(run, replicates=FEW)["editors"]["e"]
    assert (entries["collapse_step"]["value"], entries["collapse_step"]["low"]) == (2.0, 1.0)
    assert (entries["collapse_edits"]["value"], entries["collapse_edits"]["low"]) == (20.0, 10.0)


def test_what_the_unedited_model_knew_does_not_count_as_retained(tmp_path: Path) -> None:
    """The unedited model scores .3, and all edits are forgotten: the accuracy of .3 is no more than it knew anyway."""
    events = [event(i, i + 1, time=float(i), subject=f"s{i}") for i in range(10)]
    questions = [question(f"e{i}-edit", f"e{i}") for i in range(10)]
    same = {"n_tokens": 10, "logprob": -1.0, "exact": False}
    base = [{"question_id": f"e{i}-edit", "token_hits": 3, **same} for i in range(10)]
    rows = [now(i, 10) | {"n_tokens": 10} for i in range(10)]
    rows += [ask(i, s, 3 if s > 6 else 10) | {"n_tokens": 10} for s in (6, 8, 10) for i in range(5)]
    run = load_run(write_run(tmp_path, events, questions, {"e": rows}, base))
    assert values(run)["collapse_step"] == 8.0


def test_texts_of_benchmarks_give_a_perplexity_too(tmp_path: Path) -> None:
    text = {"split": "text", "topic": "bench:wikitext", "probe": "benchmarks", "probe_step": 4, "question_id": "x0"}
    base = [{"question_id": "x0", "n_tokens": 10, "logprob": -20.0}]
    got = values(small(tmp_path, [record(n_tokens=10, logprob=-30.0, **text)], base))
    assert got["perplexity_ratio"] == pytest.approx(math.e)


def test_collapse_by_retention_under_a_fifth_of_the_immediate_success(tmp_path: Path) -> None:
    events = [event(i, i + 1, time=float(i), subject=f"s{i}") for i in range(9)]
    questions = [question(f"e{i}-edit", f"e{i}") for i in range(9)]
    later = [ask(i, s, 2 * (s < 7)) for s in (6, 7, 9) for i in range(5)]
    run = load_run(write_run(tmp_path, events, questions, {"e": [now(i, 2) for i in range(9)] + later}))
    entry = summarise(run, replicates=FEW)["editors"]["e"]["collapse_step"]
    assert (entry["value"], entry["low"]) == (7.0, 6.0)


def test_edits_that_never_took_cannot_collapse(tmp_path: Path) -> None:
    """One of nine is right anyway, and the panel happens to miss it."""
    events = [event(i, i + 1, time=float(i), subject=f"s{i}") for i in range(9)]
    questions = [question(f"e{i}-edit", f"e{i}") for i in range(9)]
    rows = [now(i, 2 * (i == 0)) for i in range(9)] + [ask(i, s, 0) for s in (6, 7, 9) for i in range(5)]
    base = [{"question_id": f"e{i}-edit", "token_hits": 2 * (i == 0), "n_tokens": 2, "logprob": -2.0, "exact": i == 0} for i in range(9)]
    for name, known, expected in (("noop", base, None), ("taught", base[1:], 6.0)):
        run = load_run(write_run(tmp_path / name, events, questions, {"e": rows}, base=known))
        assert values(run)["collapse_step"] == expected


def test_half_life_is_where_conditional_retention_crosses_one_half(tmp_path: Path) -> None:
    events = [event(i, i + 1, subject=f"s{i}") for i in range(40)]
    questions = [question(f"e{i}-edit", f"e{i}") for i in range(40)]
    right_after = [now(i, 2 if i < 30 else 0) for i in range(40)]
    ages = {1: 2, 2: 2, 4: 2, 8: 0, 16: 0}
    later = [ask(i, i + 1 + a, hits) for a, hits in ages.items() for i in range(5, 12)]
    lost_at_once = [ask(35, 40, 0)]
    got = values(load_run(write_run(tmp_path / "a", events, questions, {"e": [*right_after, *later, *lost_at_once]})))
    assert got["half_life"] == pytest.approx(math.sqrt(4 * 8))
    kept = [r | {"token_hits": 2} for r in later]
    assert values(load_run(write_run(tmp_path / "b", events, questions, {"e": [*right_after, *kept]})))["half_life"] is None


def test_costs_come_from_the_reports(fake: Run, fake_summary: dict) -> None:
    entries = fake_summary["editors"]["finetune"]
    assert entries["edits"] == {"value": 60.0, "low": None, "high": None, "n": 60}
    assert entries["seconds_per_edit"]["value"] == pytest.approx(0.4)
    assert entries["state_bytes"]["value"] == 20_000 * 60


def test_a_metric_without_answers_is_absent_and_has_a_note(tmp_path: Path) -> None:
    summary = summarise(small(tmp_path, [ask(0, 4, 2)]), replicates=FEW)
    assert {"edit_success", "edits"} <= set(summary["editors"]["e"])
    assert not {"portability", "general_score", "perplexity_ratio", "forgetting"} & set(summary["editors"]["e"])
    assert any("not measured" in n and "portability" in n for n in summary["run"]["notes"])


def test_a_note_that_editors_share_is_one_line() -> None:
    notes = ["a: derived values", "one order", "b: derived values", "c: derived values, nearly", "other: derived values"]
    assert merged_notes(notes, ["a", "b", "c"]) == [
        "a, b: derived values",
        "one order",
        "c: derived values, nearly",
        "other: derived values",
    ]
    assert merged_notes(["a: one order", "one order"], ["a"]) == ["a: one order", "one order"]
    assert merged_notes(["memit+prune: x", "memit: x"], ["memit", "memit+prune"]) == ["memit+prune, memit: x"]


def test_noop_scores_what_the_unedited_model_scored(fake: Run, fake_summary: dict) -> None:
    rows = fake.editors["noop"].records
    end = rows[(rows["split"] == "edit") & (rows["probe"] == "retention") & rows["live"] & (rows["step"] == 60)]
    before = fake.editors["noop"].base["tf"].to_numpy()[end["question"]].mean()
    assert fake_summary["editors"]["noop"]["edit_success"]["value"] == pytest.approx(before)
    for name in ("forgetting", "forgetting_max", "general_drop"):
        assert fake_summary["editors"]["noop"][name]["value"] == 0.0
    assert fake_summary["editors"]["noop"]["perplexity_ratio"]["value"] == 1.0


def test_oracle_is_right_everywhere(fake_summary: dict) -> None:
    oracle = fake_summary["editors"]["oracle"]
    for name in ("edit_success", "edit_success_now", "harmonic_mean", "portability", "locality_far"):
        for suffix in ("", "_exact", "_gen"):
            assert oracle[name + suffix]["value"] == 1.0
            assert oracle[name + suffix]["low"] < 1.0


def test_pairs_are_differences_on_the_same_questions(fake_summary: dict) -> None:
    editors, pairs = fake_summary["editors"], fake_summary["pairs"]
    assert len(pairs) == len(EDITORS) * (len(EDITORS) - 1) // 2
    for name, entry in pairs["finetune - balancedit"].items():
        assert entry["value"] == pytest.approx(editors["finetune"][name]["value"] - editors["balancedit"][name]["value"])
    assert pairs["oracle - finetune"]["edit_success"]["low"] > 0


def test_a_paired_interval_is_narrower_than_the_unpaired_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    events = [event(i, i + 1, subject=f"s{i}") for i in range(200)]
    questions = [question(f"e{i}-edit", f"e{i}") for i in range(200)]
    hits = rng.integers(0, 2, 200) * 2
    a = [ask(i, 200, int(h)) for i, h in enumerate(hits)]
    b = [ask(i, 200, 0 if i < 6 else int(h)) for i, h in enumerate(hits)]
    summary = summarise(load_run(write_run(tmp_path, events, questions, {"a": a, "b": b})))
    pair, single = summary["pairs"]["a - b"]["edit_success"], summary["editors"]["a"]["edit_success"]
    assert pair["high"] - pair["low"] < 0.5 * (single["high"] - single["low"])


def test_an_editor_cut_short_is_compared_at_the_last_common_step(tmp_path: Path) -> None:
    events = [event(i, i + 1, subject=f"s{i}") for i in range(4)]
    questions = [question(f"e{i}-edit", f"e{i}") for i in range(4)]
    a = [ask(0, 2, 2), ask(1, 2, 2), ask(0, 4, 0), ask(1, 4, 0)]
    b = [ask(0, 2, 0), ask(1, 2, 2)]
    summary = summarise(load_run(write_run(tmp_path, events, questions, {"a": a, "b": b})), replicates=FEW)
    assert summary["pairs"]["a - b"]["edit_success"]["value"] == pytest.approx(0.5)
    assert any("b: cut short at step 2 of 4" in n for n in summary["run"]["notes"])


def test_a_scoring_mode_that_one_editor_lacks_is_not_compared(tmp_path: Path) -> None:
    run = small(tmp_path, [ask(0, 4, 2), ask(1, 4, 2)])
    rows = run.editors["e"].records
    a, b = in_common(rows, rows.assign(gen=[1.0, np.nan]))
    assert a["gen"].isna().tolist() == b["gen"].isna().tolist() == [False, True]


def test_the_catalogue_names_every_metric_and_the_docs_explain_it(fake_summary: dict) -> None:
    for entries in [*fake_summary["editors"].values(), *fake_summary["pairs"].values()]:
        assert all(n in METRICS or metric_of(n).modes for n in entries)
    text = (Path(__file__).parents[2] / "docs" / "semantics.md").read_text("utf-8")
    assert [m for m in METRICS if f"`{m}`" not in text] == []


def test_same_seed_same_summary(fake: Run, fake_summary: dict) -> None:
    assert summarise(fake, replicates=FEW) == fake_summary
    other = summarise(fake, seed=1, replicates=FEW)["editors"]["finetune"]["edit_success"]
    assert other["value"] == fake_summary["editors"]["finetune"]["edit_success"]["value"]
    assert other["low"] != fake_summary["editors"]["finetune"]["edit_success"]["low"]


def test_guessing_scores_one_over_the_number_of_competing_choices() -> None:
    questions = [
        question("a", choices=["x", "y", "z"], scoring="sum"),
        question("b", choices=["x", "y", "z"], aliases=["y"], scoring="sum"),
    ]
    questions += [question("c"), question("d", scoring="refuse")]
    np.testing.assert_allclose(chance_scores(pd.DataFrame(questions)), [1 / 3, 1 / 2, 0.0, np.nan])
    np.testing.assert_allclose(chance_scores(pd.DataFrame({"question_id": ["old"]})), [0.0])


def test_skill_lost_takes_guessing_out(tmp_path: Path) -> None:
    """Two of four: from 4 of 4 to 2 of 4 is a fall to guessing, skill lost 1; free: from 2 of 2 to 1 of 2, skill lost 1/2."""
    pairs = [question(f"p{i}", None, "general", topic="bench:pairs", choices=["a", "b"], answer="a", scoring="sum") for i in range(4)]
    free = [question(f"f{i}", None, "general", topic="bench:free") for i in range(2)]
    ids = [q["question_id"] for q in (*pairs, *free)]
    base = [{"question_id": q, **answer(2)} for q in ids]
    rows = [
        record(
            question_id=q,
            split="general",
            probe_step=1,
            panel="benchmark",
            topic=f"bench:{'pairs' if q[0] == 'p' else 'free'}",
            **answer(h),
        )
        for q, h in zip(ids, (2, 0, 2, 0, 2, 0))
    ]
    got = values(load_run(write_run(tmp_path, [event(0, 1)], [*pairs, *free], {"e": rows}, base)))
    assert got["skill_drop"] == pytest.approx((1 + 1 / 2) / 2)
    assert got["benchmark_drop_gen"] == pytest.approx(1 / 2)


def test_gain_is_over_the_unedited_model(tmp_path: Path) -> None:
    base = [{"question_id": f"e{i}-edit", **answer(h)} for i, h in enumerate((0, 2, 1, 0))]
    got = values(small(tmp_path, [now(0, 2), now(1, 2), now(2, 2), now(3, 0)], base))
    assert got["edit_gain"] == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    assert got["edit_gain_exact"] == pytest.approx((1 + 0 + 1 + 0) / 4)
