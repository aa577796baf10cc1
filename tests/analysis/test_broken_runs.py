"""Hard edits, internal signals, verdicts, and published numbers beside a run."""

from __future__ import annotations

import json
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
from analysis.reporting import published
from analysis.reporting.verdict import verdicts
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


def test_a_verdict_says_whether_and_when_an_editor_breaks(tmp_path: Path) -> None:
    whole, broken = run_of(tmp_path / "a"), run_of(tmp_path / "b", broken_at=13)
    signs = [verdicts(figure_context(r, summarise(r, replicates=20), replicates=20))["e"] for r in (whole, broken)]
    assert [s["Breaks"].tone for s in signs] == ["good", "bad"]
    assert signs[1]["Breaks"].word == "broke in steps 12–13"
    assert signs[0]["Forgets"].word == "holds"
    assert signs[0]["Learns"].word == "100 %"
    assert signs[0]["Damage"].word == "not asked"


def test_published_numbers_are_of_known_metrics_with_their_source() -> None:
    for source in published.sources():
        assert all(m in METRICS or metric_of(m).modes for m in source["metrics"]), source["paper"]
        assert all(metric_of(m).unit == "share" for m in source["metrics"])
        assert all(len(numbers) == len(source["metrics"]) for numbers in source["rows"].values()), source["paper"]
        assert all(n is None or 0 <= n <= 100 for numbers in source["rows"].values() for n in numbers)
        assert source["order"] in ("sequential", "single")
        assert source["scoring"] in ("token", "exact", "gen", "judge", "unstated")


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
