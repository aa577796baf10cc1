"""Trackers show what a run saved, no more and no less; each is read back through its own library.

mlflow is not among the packages of the test extra (it brings 20 more); its test runs where it is installed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testbed.core.schema import EditReport, MonitorRow, Record
from testbed.experiment import runner, track
from testbed.experiment.config import BadConfig, RunConfig
from testbed.experiment.track import NEEDS, TrackedRun, missing, numbers, tracking
from testbed.storage.run_folder import StepResults
from tests.helpers.fake_run import record
from tests.helpers.models import folder

STEPS = 4


def found(*rows: dict[str, Any], reports: list[EditReport] | None = None) -> StepResults:
    blank = dict.fromkeys(f for f in Record.__slots__)
    return StepResults([Record(**{**blank, **record(**r)}) for r in rows], [MonitorRow(2, "entropy", 0.5)], reports or [])


def test_scoring_modes_are_kept_apart_and_weighted_by_inclusion() -> None:
    both = {"split": "edit", "panel": "immediate", "probe_step": 2, "n_tokens": 2}
    one = {**both, "exact": True, "token_hits": 2, "incl_prob": 1.0}
    two = {**both, "exact": False, "token_hits": 1, "incl_prob": 0.5}
    got = numbers(found(one, two))[2]
    assert got["immediate/edit/generated"] == pytest.approx(1 / 3)
    assert got["immediate/edit/tokens"] == pytest.approx((1 + 2 * 0.5) / 3)
    assert got["immediate/edit/all_tokens"] == pytest.approx(1 / 3)
    assert got["monitor/entropy"] == 0.5


def test_what_was_not_measured_is_absent() -> None:
    text = {"split": "text", "panel": "fixed", "probe_step": 1, "n_tokens": 4, "logprob": -6.0}
    loose = {"split": "general", "panel": "fixed", "probe_step": 1, "exact": True}
    got = numbers(found(text, loose))[1]
    assert got == {"fixed/text/nll": 1.5, "fixed/general/generated": 1.0}


def test_cost_and_failures_come_from_the_report() -> None:
    report = EditReport(3, ("a", "b"), 0.5, 7, 9, None, {"a": "why"}, {}, {"loss": 2.0})
    assert numbers(found(reports=[report]))[3] == {
        "cost/seconds": 0.5,
        "cost/peak_bytes": 7,
        "cost/state_bytes": 9,
        "edits/asked": 2,
        "edits/failed": 1,
        "edits/skipped": 0,
        "notes/loss": 2.0,
    }


def config(out: Path, **more: Any) -> RunConfig:
    """Two editors, four edits, saved at every second step."""
    asked = {"edits": STEPS, "probe_budget": 10, "max_new_tokens": 2, "save_every": 2, "device": "cpu", "set": ("finetune.steps=2",)}
    facts = out.parent / "facts.jsonl"
    facts.write_text("".join(json.dumps({"prompt": f"Who owns the ship {i}?", "target": f"Ann {i}"}) + "\n" for i in range(9)))
    return RunConfig("jsonl:facts.jsonl", ("noop", "finetune"), str(folder("gpt2")), out.parent, out=out, **{**asked, **more})


def run(out: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> dict[str, dict[int, dict[str, float]]]:
    """A run under a tracker; what was saved, by editor and step."""
    kept: dict[str, dict[int, dict[str, float]]] = {"noop": {}, "finetune": {}}
    plain = track._show

    def show(seen: StepResults, tracker: Any) -> None:
        for step, values in numbers(seen).items():
            kept[seen.records[0].editor][step] = values
        plain(seen, tracker)

    with monkeypatch.context() as patch:
        patch.setattr(track, "_show", show)
        patch.setattr(runner, "finish", lambda out: {})
        runner.study(config(out, track=name))
    assert [sorted(steps) for steps in kept.values()] == [list(range(1, STEPS + 1))] * 2
    assert "cost/seconds" in kept["finetune"][1]
    return kept


def same(got: dict[int, float], kept: dict[int, dict[str, float]], name: str) -> None:
    assert got == pytest.approx({step: values[name] for step, values in kept.items() if name in values}, rel=1e-6, nan_ok=True)


def test_tensorboard_holds_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    kept = run(tmp_path / "run", monkeypatch, "tensorboard")
    for editor, steps in kept.items():
        events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / editor))
        events.Reload()
        assert set(events.Tags()["scalars"]) == {name for values in steps.values() for name in values}
        for name in events.Tags()["scalars"]:
            same({e.step: e.value for e in events.Scalars(name)}, steps, name)


def messages(raw: bytes) -> Iterator[bytes]:
    """What an offline run of wandb stored: LevelDB's log format, blocks of 32 KiB, behind a header of 7 bytes.

    A chunk begins with a checksum (4 bytes), its length (2) and its kind (1 whole, 2 first, 3 middle, 4 last).
    """
    at, part = 7, b""
    while at + 7 <= len(raw):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(raw[at + 4 : at + 6], "little"), raw[at + 6]
        part += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield part
            part = b""


def records(path: Path) -> list[Any]:
    """All records of an offline run; wandb's own process may still be writing when a run has ended."""
    from wandb.proto import wandb_internal_pb2

    for _ in range(300):
        found: list[Any] = [wandb_internal_pb2.Record.FromString(m) for m in messages(path.read_bytes())]  # type: ignore[attr-defined]
        if any(r.WhichOneof("record_type") == "exit" for r in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} was never ended")


@pytest.mark.ci
def test_wandb_holds_every_number_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = run(tmp_path / "run", monkeypatch, "wandb")
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime)
    assert len(files) == len(kept)
    for path, steps in zip(files, kept.values()):
        got = {}
        for message in records(path):
            if message.history.item:
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in message.history.item}
                got[int(row["_step"])] = row
        assert set(got) == set(steps)
        for step, values in steps.items():
            assert {k: v for k, v in got[step].items() if not k.startswith("_")} == pytest.approx(values)


@pytest.mark.skipif(bool(missing("mlflow")), reason="mlflow and its 20 packages are not part of the test extra; pip install '.[track]'")
def test_mlflow_holds_every_number_and_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    kept = run(tmp_path / "run", monkeypatch, "mlflow")
    client = MlflowClient(f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name != "Default"]
    runs = {r.info.run_name: r for r in client.search_runs([experiment.experiment_id])}
    assert set(runs) == set(kept)
    for editor, steps in kept.items():
        assert set(runs[editor].data.metrics) == {name for values in steps.values() for name in values}
        for name in runs[editor].data.metrics:
            same({m.step: m.value for m in client.get_metric_history(runs[editor].info.run_id, name)}, steps, name)
    about = TrackedRun(tmp_path / "run", experiment.name, "noop", {})
    with tracking("mlflow", about) as saved:
        saved(StepResults(reports=[EditReport(STEPS + 1, ("a",), 1.0)]))
    assert len(client.search_runs([experiment.experiment_id])) == len(kept)


def test_a_tracker_changes_no_answer_and_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    monkeypatch.setattr(runner, "finish", lambda out: {})
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    outs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for out, name in zip(outs, (None, "tensorboard")):
        runner.study(config(out, track=name))
    rows = [pq.read_table(o / "finetune" / "records").drop_columns(["seconds"]) for o in outs]
    assert rows[0].equals(rows[1])
    stored = [json.loads((o / "manifest.json").read_text()) for o in outs]
    assert "track" not in stored[1]["config"]
    assert stored[0]["run"] == stored[1]["run"]


@pytest.mark.parametrize("name", list(NEEDS))
def test_a_missing_library_is_reported_before_anything_is_loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    (problem,) = [p for p in RunConfig(track=name).problems() if "--track" in p]  # type: ignore[arg-type]
    assert problem.startswith(f"--track {name} needs {NEEDS[name][0]}")
    assert "pip install 'lifelong-editing-testbed[track]'" in problem


def test_an_unknown_tracker_is_refused() -> None:
    from testbed.experiment.config import set_fields

    with pytest.raises(BadConfig, match="track='visdom': expected one of tensorboard, wandb, mlflow"):
        set_fields(RunConfig(), {"track": "visdom"})


@pytest.mark.ci
def test_a_tracker_that_is_not_asked_for_is_not_imported() -> None:
    import subprocess

    code = "import sys, testbed.experiment.runner\nprint([m for m in ('tensorboard', 'wandb', 'mlflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


def test_numbers_that_are_not_finite_are_shown_as_they_are() -> None:
    got = numbers(found(reports=[EditReport(1, ("a",), notes={"loss": math.nan})]))
    assert math.isnan(got[1]["notes/loss"])


def test_without_a_tracker_nothing_is_called() -> None:
    with tracking(None, TrackedRun(Path("none"), "r", "e", {})) as saved:
        assert saved(StepResults()) is None
