"""Deferral: shares by split and their balance, by hand and weighted, at the last step, from stored answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from analysis.metrics.bootstrap import Resampler
from analysis.metrics.from_extras import deferral, gate_decisions
from analysis.reading.load import Run, load_run
from tests.helpers.fake_run import event, question, record, write_run

Row = tuple[int, str, bool, float]
"""Step, split, whether an entry answered, and inclusion probability."""


def run_of(out: Path, rows: list[Row]) -> Run:
    """A run in which each row is an answer to a question of its own about the first of two edits."""
    events = [event(0, 1), event(1, 3)]
    questions = [question(f"q{i}", None if split == "general" else "e0", split) for i, (_, split, _, _) in enumerate(rows)]
    records = [
        record(
            question_id=f"q{i}", edit_id=questions[i]["event_id"], edit_step=1, split=split, probe_step=step, incl_prob=share,
            extras=json.dumps({"entry": "e0" if fired else None}),
        )
        for i, (step, split, fired, share) in enumerate(rows)
    ]  # fmt: skip
    return load_run(write_run(out, events, questions, {"e": records}))


def values(run: Run) -> dict[str, float]:
    metrics = deferral(run, run.editors["e"], Resampler(run.clusters, np.random.default_rng(0), 20))
    return {name: draws.value for name, draws in metrics.items()}


def test_precision_and_recall_by_hand(tmp_path: Path) -> None:
    rows: list[Row] = [
        (1, "edit", False, 1.0),  # an earlier step does not count
        (2, "edit", True, 1.0),
        (2, "text_generality", False, 0.5),
        (2, "text_generality", True, 1.0),
        (2, "locality_hard", True, 0.25),
        (2, "locality_hard", False, 0.5),
        (2, "locality_far", False, 1.0),
        (2, "general", False, 1.0),
        (2, "portability", False, 0.1),  # neither to be answered nor to be left
    ]
    got = values(run_of(tmp_path, rows))
    bearing, unrelated = (0 + 2 / 3) / 2, (1 / 3 + 1 + 1) / 3
    assert got["deferral_recall"] == pytest.approx(unrelated)
    assert got["deferral_precision"] == pytest.approx(unrelated / (unrelated + bearing))
    assert {k: v for k, v in got.items() if k.startswith("deferred")} == pytest.approx({
        "deferred_edit": 0.0, "deferred_text_generality": 2 / 3, "deferred_locality_hard": 1 / 3, "deferred_locality_far": 1.0,
        "deferred_general": 1.0,
    })  # fmt: skip


def test_a_gate_that_always_defers_scores_one_half_whatever_the_panel_holds(tmp_path: Path) -> None:
    rows: list[Row] = [(1, "edit", False, 1.0)] * 2 + [(1, "locality_far", False, 1.0)] * 30 + [(1, "general", False, 1.0)] * 40
    assert values(run_of(tmp_path, rows))["deferral_precision"] == 0.5


def test_intervals_are_those_of_clusters_of_distinct_questions(tmp_path: Path) -> None:
    rows: list[Row] = [(1, s, i % 3 == 0, 1.0) for s in ("edit", "locality_far") for i in range(30)]
    run = run_of(tmp_path, rows)
    entry = deferral(run, run.editors["e"], Resampler(run.clusters, np.random.default_rng(0), 200))["deferred_locality_far"].interval()
    assert (entry["value"], entry["n"], entry["questions"]) == (pytest.approx(2 / 3), 30, 30)
    assert entry["low"] is not None and entry["low"] < 0.55


def test_an_undefined_metric_is_absent(tmp_path: Path) -> None:
    assert set(values(run_of(tmp_path / "a", [(1, "edit", True, 1.0)]))) == {"deferred_edit"}
    assert set(values(run_of(tmp_path / "b", [(1, "general", True, 1.0)]))) == {"deferred_general", "deferral_recall"}


def test_an_editor_that_defers_exactly_what_it_should_scores_one(tmp_path: Path) -> None:
    got = values(run_of(tmp_path, [(1, "edit", True, 1.0), (1, "locality_far", False, 1.0), (1, "general", False, 0.5)]))
    assert (got["deferral_precision"], got["deferral_recall"]) == (1.0, 1.0)


def test_decisions_are_read_from_extras_but_for_those_right_after_an_edit_or_before_it(tmp_path: Path) -> None:
    extras = [{"entry": None, "distance": 4}, {"entry": "abc"}, {}, {"entry": "abc"}, {"entry": None}]
    splits, made = ["locality_far", "edit", "general", "edit", "edit"], ["e0", "e0", None, "e0", "e1"]
    probes = ["locality", "retention", "general", "right_after", "coming"]
    questions = [question(f"q{i}", e, s) for i, (e, s) in enumerate(zip(made, splits))]
    rows = [
        record(
            question_id=f"q{i}", edit_id=e, edit_step={"e0": 1, "e1": 4}.get(e or ""), probe=p, split=s, probe_step=3, extras=json.dumps(x)
        )
        for i, (e, p, s, x) in enumerate(zip(made, probes, splits, extras))
    ]
    run = load_run(write_run(tmp_path, [event(0, 1), event(1, 4)], questions, {"e": rows}))
    found = gate_decisions(run.editors["e"])
    assert found[["step", "split", "fired"]].to_numpy().tolist() == [[3, "locality_far", False], [3, "edit", True]]
    assert set(values(run)) == {"deferred_edit", "deferred_locality_far", "deferral_recall", "deferral_precision"}
