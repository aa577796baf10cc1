"""The figure of editors with a gate, against values computed by hand from stored answers and reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.figures import catalogue, stored_edits
from analysis.figures.context import figure_context
from analysis.metrics.bootstrap import Resampler
from analysis.metrics.summary import summarise
from analysis.reading.load import Run, load_run
from analysis.reading.records import FREE_GENERATION
from tests.helpers.fake_run import event, question, record, write_run

SPLITS = ("edit", "text_generality", "image_generality", "locality_hard")


def answers(editor: str, step: int, rights: dict[str, list[int]], fired: list[int] | None) -> list[dict[str, Any]]:
    """Two questions of each split about edits 0 and 1; `fired` has a decision each, in the order of SPLITS."""
    out = []
    for s, split in enumerate(SPLITS):
        for i, right in enumerate(rights.get(split, [1, 1])):
            hit = None if fired is None else fired[2 * s + i]
            extras = "{}" if hit is None else json.dumps({"distance": 1.0, "entry": "e0" if hit else None}, sort_keys=True)
            row = record(editor=editor, probe_step=step, probe_time=float(step), split=split, question_id=f"{i}-{split}", extras=extras)
            out.append(row | {"edit_id": f"e{i}", "edit_step": 1, "exact": bool(right), "incl_prob": 0.5 if i else 1.0})
    return out


@pytest.fixture
def run(tmp_path: Path) -> Run:
    events = [event(i, i + 1, time=float(i + 1), subject=f"s{i}") for i in range(2)]
    questions = [question(f"{i}-{s}", f"e{i}", s) for i in range(2) for s in SPLITS]
    rights = {"text_generality": [1, 0], "locality_hard": [0, 1]}
    records = {
        "gate": answers("gate", 2, rights, [1, 1, 1, 0, 0, 0, 1, 0]),
        "weights": answers("weights", 2, {}, None),
    }
    write_run(tmp_path, events, questions, records)
    reports = tmp_path / "gate" / "edits.jsonl"
    lines = [
        json.loads(x) | {"notes": {"entries": i + 1.0}, "state_bytes": 100 * (i + 1)}
        for i, x in enumerate(reports.read_text().splitlines())
    ]
    reports.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return load_run(tmp_path)


def resampler(run: Run) -> Resampler:
    return Resampler(run.clusters, np.random.default_rng(0), 50)


def test_hit_rates_are_weighted_by_one_over_the_inclusion_probability(run: Run) -> None:
    gate = run.editors["gate"]
    rephrased = stored_edits.hit_rate(run, gate, resampler(run), locality=False)
    locality = stored_edits.hit_rate(run, gate, resampler(run), locality=True)
    assert rephrased["x"].tolist() == locality["x"].tolist() == [2.0]
    assert rephrased["value"].tolist() == pytest.approx([1 / 6])  # rows of edit 1 count twice
    assert locality["value"].tolist() == pytest.approx([1 / 3])


def test_the_harmonic_mean_is_of_generality_and_hard_locality(run: Run) -> None:
    got = stored_edits.harmonic_mean(run, run.editors["gate"], resampler(run), FREE_GENERATION)
    assert got["value"].tolist() == pytest.approx([3 / (1 / (1 / 3) + 1 / 1 + 1 / (2 / 3))])


def test_entries_and_bytes_are_those_of_the_reports(run: Run) -> None:
    counts = stored_edits.entries(run, run.editors["gate"], resampler(run))
    assert counts[["x", "value"]].to_numpy().tolist() == [[1, 1], [2, 2]]
    assert stored_edits.state_bytes(run, run.editors["gate"], resampler(run))["value"].tolist() == [100, 200]
    assert stored_edits.entries(run, run.editors["weights"], resampler(run)).empty
    assert stored_edits.state_bytes(run, run.editors["weights"], resampler(run)).empty


@pytest.mark.ci
def test_the_figure_is_drawn_only_where_an_editor_has_a_gate(run: Run, tmp_path: Path) -> None:
    drawn = catalogue.draw_all(figure_context(run, summarise(run)))
    titles = [ax.get_title(loc="left") or ax.get_title() for ax in drawn["gated"].axes]
    assert "Entries" in titles and "Harmonic mean" in titles and len(titles) == 9
    del run.editors["gate"]
    assert "gated" not in catalogue.draw_all(figure_context(run, summarise(run)))
