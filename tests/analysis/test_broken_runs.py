"""Hard edits, internal signals, verdicts, and published numbers beside a run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.figures import state
from analysis.figures.context import figure_context
from analysis.metrics import collapse
from analysis.metrics.catalogue import METRICS, metric_of
from analysis.metrics.summary import summarise
from analysis.reading.load import EditorRun, Run, load_run
from analysis.reading.records import TOKEN_ACCURACY
from analysis.reporting import published
from analysis.reporting.verdict import VerdictCell, headline, verdicts
from tests.helpers.fake_run import event, question, record, write_run

EDITS = 24


def run_of(out: Path, norms: list[float | None] | None = None, broken_at: int | None = None, **manifest: object) -> Run:
    """One edit a step, with the given norms of the accumulated change; running text breaks down at a step."""
    events = [event(i, i + 1, time=i / 12, subject=f"s{i}", previous="old") for i in range(EDITS)]
    questions = [question(f"e{i}-edit", f"e{i}") for i in range(EDITS)] + [question("x", None, "text", answer=None)]
    scored = {"token_hits": 2, "n_tokens": 2, "logprob": -1.0, "exact": True, "generated": "yes"}
    rows = [record(edit_id=f"e{i}", question_id=f"e{i}-edit", probe="right_after", probe_step=i + 1, **scored) for i in range(EDITS)]
    rows += [record(edit_id=f"e{i}", question_id=f"e{i}-edit", probe_step=EDITS, **scored) for i in range(EDITS)]
    for step in (11, 12, 13, 14):
        worse = broken_at is not None and step >= broken_at
        rows.append(record(question_id="x", split="text", probe="general", probe_step=step, n_tokens=10, logprob=-40.0 if worse else -20.0))
    base = [{"question_id": "x", "n_tokens": 10, "logprob": -20.0}]
    run = write_run(out, events, questions, {"e": rows}, base, **manifest)
    lines = [json.loads(line) for line in (run / "e" / "edits.jsonl").read_text().splitlines()]
    for line, norm in zip(lines, norms or [None] * EDITS):
        line["delta_norm"] = norm
    (run / "e" / "edits.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return load_run(run)


def editor_of(run: Run) -> EditorRun:
    return run.editors["e"]


def test_a_step_many_times_larger_than_the_median_is_hard(tmp_path: Path) -> None:
    steps = [1.0] * EDITS
    steps[15] = 30.0
    run = run_of(tmp_path, np.sqrt(np.cumsum(np.square(steps))).tolist())
    hard = collapse.find_hard_edits(run, editor_of(run))
    assert hard is not None
    assert hard["step"].tolist() == [16]
    assert hard["why"].tolist() == ["changed the weights 30 times as much as the median edit before"]
    assert summarise(run, replicates=20)["editors"]["e"]["hard_edits"] == {"value": 1.0, "low": None, "high": None, "n": EDITS}


def test_even_steps_and_the_first_ones_are_not_hard(tmp_path: Path) -> None:
    steps = [1.0] * EDITS
    steps[3] = 30.0
    run = run_of(tmp_path, np.sqrt(np.cumsum(np.square(steps))).tolist())
    hard = collapse.find_hard_edits(run, editor_of(run))
    assert hard is not None
    assert hard.empty


def test_the_only_step_between_intact_and_collapsed_is_hard(tmp_path: Path) -> None:
    run = run_of(tmp_path, broken_at=13)
    hard = collapse.find_hard_edits(run, editor_of(run))
    assert hard is not None
    assert hard["step"].tolist() == [13]


def test_without_weights_and_collapse_there_are_no_hard_edits(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    assert collapse.find_hard_edits(run, editor_of(run)) is None
    assert "hard_edits" not in summarise(run, replicates=20)["editors"]["e"]
    assert collapse.hard_edits_as_jsonl(run, editor_of(run)) == ""


def test_hard_edits_are_a_stream_that_the_testbed_reads(tmp_path: Path) -> None:
    from streams.base import StreamConfig
    from testbed.core.registry import STREAMS

    run = run_of(tmp_path / "run", broken_at=13)
    path = tmp_path / "hard.jsonl"
    path.write_text(collapse.hard_edits_as_jsonl(run, editor_of(run)))
    row = json.loads(path.read_text())
    assert (row["edit_id"], row["step"], row["editor"]) == ("e12", 13, "e")
    stream = STREAMS.get(f"jsonl:{path}")(StreamConfig())
    (edit,) = stream.events(1)
    assert (edit.prompt, edit.target, edit.previous) == ("Who is 12?", "t12", "old")


def test_signals_come_from_monitors_and_reports_and_drop_what_is_not_finite(tmp_path: Path) -> None:
    run = run_of(tmp_path, [float(i) for i in range(EDITS)])
    folder = tmp_path / "e" / "monitors"
    folder.mkdir()
    table = pd.DataFrame({"step": [4, 8, 8], "name": ["own", "entropy", "kl_base"], "value": [1.0, 2.0, np.nan]})
    table.to_parquet(folder / "step-000004.parquet")
    rows = state.signals(run, editor_of(run))
    assert list(dict.fromkeys(rows["name"])) == ["delta_norm", "entropy", "own"]
    assert rows.loc[rows["name"] == "entropy", ["x", "value"]].to_numpy().tolist() == [[8.0, 2.0]]
    assert state.signals(run_of(tmp_path / "none"), load_run(tmp_path / "none").editors["e"]).empty


def test_long_signals_are_downsampled_to_medians_of_stretches() -> None:
    long = pd.DataFrame({"x": np.arange(2000.0), "value": np.arange(2000.0) % 10})
    short = state.downsampled(long)
    assert len(short) == state.MOST_POINTS
    assert short["x"].iloc[-1] == 1999
    assert set(short["value"]) == {4.5}
    assert state.downsampled(long[:50]).equals(long[:50])


def cells_of(entries: dict[str, dict], run: Run) -> dict[str, VerdictCell]:
    """The verdict of an editor with these metrics."""
    context = figure_context(run, summarise(run, replicates=20), replicates=20)
    return verdicts(replace(context, mode=TOKEN_ACCURACY, summary={"editors": {"e": entries}}))["e"]


def entry(value: float | None, low: float | None = None, high: float | None = None, **more: object) -> dict:
    return {"value": value, "low": low, "high": high, "n": 100, **more}


def test_a_verdict_says_whether_and_when_an_editor_breaks(tmp_path: Path) -> None:
    whole, broken, last = run_of(tmp_path / "a"), run_of(tmp_path / "b", broken_at=13), run_of(tmp_path / "c", broken_at=14)
    signs = [verdicts(figure_context(r, summarise(r, replicates=20), replicates=20))["e"] for r in (whole, broken, last)]
    assert [(s["Breaks"].tone, s["Breaks"].word) for s in signs] == [
        ("good", "whole"), ("bad", "broke in steps 12–13"), ("bad", "marked at the last checkpoint, unconfirmed"),
    ]  # fmt: skip
    assert signs[1]["Breaks"].detail == "after 13 edits"
    assert signs[0]["Forgets"].word == "holds"
    assert signs[0]["Learns"].word == "100 %"
    assert (signs[0]["Damage"].tone, signs[0]["Damage"].word) == ("good", "perplexity unchanged")
    assert signs[0]["Spares"].word == "not measured"


def test_what_was_not_measured_is_not_praised(tmp_path: Path) -> None:
    cells = cells_of({}, run_of(tmp_path))
    assert {(c.tone, c.word, c.mark) for c in cells.values()} == {("none", "not measured", "")}


def test_an_editor_that_multiplied_perplexity_and_changed_every_look_alike_is_not_praised(tmp_path: Path) -> None:
    """Numbers of fine-tuning on a real model, which was called whole and its abilities intact."""
    entries = {
        "edit_success_now": entry(0.73, 0.6, 0.83), "edit_gain": entry(0.73, 0.6, 0.83), "edit_success": entry(0.45, 0.3, 0.6),
        "forgetting": entry(0.28, -0.02, 0.5), "perplexity_ratio": entry(11.0, 8.0, 15.0), "locality_hard": entry(0.0, 0.0, 0.1),
        "general_score": entry(0.0), "general_drop": entry(0.0, -0.1, 0.1), "collapse_step": entry(None), "collapse_edits": entry(None),
        "collapse_unconfirmed": entry(24.0, 14.0, 24.0),
    }  # fmt: skip
    cells = cells_of(entries, run_of(tmp_path))
    assert {k: (c.tone, c.word) for k, c in cells.items() if k != "Cost"} == {
        "Learns": ("some", "73 %"),
        "Forgets": ("some", "may forget 28 points"),
        "Breaks": ("bad", "marked at the last checkpoint, unconfirmed"),
        "Spares": ("bad", "0 % of look-alikes"),
        "Damage": ("bad", "perplexity × 11.000"),
    }
    assert "nothing to lose" in cells["Damage"].detail
    said = headline(entries, TOKEN_ACCURACY)
    assert "0 % of look-alikes left as they were" in said and "perplexity × 11.000" in said and "unconfirmed" in said


@pytest.mark.parametrize(("kept", "tone"), [(1.0, "good"), (0.9, "some"), (0.5, "bad")])
def test_where_the_unedited_model_knew_nothing_agreement_decides(tmp_path: Path, kept: float, tone: str) -> None:
    nothing = {"general_score": entry(0.0), "general_drop": entry(0.0, -0.1, 0.1)}
    run = run_of(tmp_path)
    assert cells_of(nothing, run)["Damage"].word.startswith("nothing to lose")
    cell = cells_of(nothing | {"unrelated_kept": entry(kept)}, run)["Damage"]
    assert (cell.tone, cell.word) == (tone, f"{100 * kept:.0f} % of unrelated answers kept")
    assert "nothing to lose" in cell.detail


def test_sibling_locality_is_in_verdict_and_headline(tmp_path: Path) -> None:
    entries = {"edit_success": entry(0.9), "locality_hard": entry(0.95), "locality_sibling": entry(0.47), "locality_far": entry(1.0)}
    cell = cells_of(entries, run_of(tmp_path))["Spares"]
    assert (cell.tone, cell.word) == ("bad", "47 % of other questions about what was edited")
    assert cell.detail == "95 % look-alikes, 100 % unrelated questions"
    assert "47 % of other questions about what was edited left as they were" in headline(entries, TOKEN_ACCURACY)
    assert "Not measured: general ability, running text." in headline(entries, TOKEN_ACCURACY)


def test_an_editor_that_learned_no_more_than_the_unedited_model_knew_has_nothing_to_forget(tmp_path: Path) -> None:
    entries = {"edit_success_now": entry(0.73), "edit_gain": entry(0.0, -0.1, 0.1), "edit_success": entry(0.7), "forgetting": entry(0.03)}
    cells = cells_of(entries, run_of(tmp_path))
    assert (cells["Learns"].tone, cells["Learns"].detail) == ("bad", "right just after the edit; 73 % unedited")
    assert cells["Forgets"].word == "nothing to forget"


def test_published_numbers_are_of_known_metrics_with_their_source() -> None:
    for source in published.sources():
        assert all(m in METRICS or metric_of(m).modes for m in source["metrics"]), source["paper"]
        assert all(metric_of(m).unit == "share" for m in source["metrics"])
        assert all(len(numbers) == len(source["metrics"]) for numbers in source["rows"].values()), source["paper"]
        assert all(n is None or 0 <= n <= 100 for numbers in source["rows"].values() for n in numbers)
        assert source["order"] in ("sequential", "single")
        assert source["scoring"] in ("token", "exact", "gen", "choice", "judge", "unstated")


def test_published_methods_are_ours() -> None:
    from testbed.core.registry import EDITORS, WRAPPERS

    named = {part for s in published.sources() for method in s["rows"] for part in method.split("+")}
    assert named <= {*EDITORS.names(), *WRAPPERS.names()}


@pytest.mark.parametrize(
    ("about", "differs"),
    [
        ({"model": {"name": "org/meta-llama-3-8b"}, "config": {"batch": 100}}, ["edits: 2000 there, 24 here"]),
        ({"model": {"name": "tiny"}, "config": {"batch": 100}}, ["model: Llama-3-8B there, tiny here", "edits: 2000 there, 24 here"]),
    ],
)
def test_a_run_beside_a_paper_says_what_differs(tmp_path: Path, about: dict, differs: list[str]) -> None:
    stream = {"name": "zsre-yearly", "origin": "file zsre.json", "time_axis": "scheduled", "skipped": 0}
    run = run_of(tmp_path, stream=stream, **about)
    summary = summarise(run, replicates=20)
    summary["editors"] = {"memit[history=true]": summary["editors"]["e"]}
    rows = published.rows(run, summary)
    best = next(r for r in rows if r["model"] == "Llama-3-8B" and r["paper"].startswith("AlphaEdit"))
    assert (best["published"], best["ours"]) == pytest.approx((0.3462, 1.0))
    assert best["metric"] == "edit_success"
    assert best["differs"].split("; ") == differs
