"""Trackers: tensorboard, wandb or mlflow show the numbers of a run as it goes (`--track`, extra [track]).

A tracker receives what was just saved, so it never shows a number that the run folder lacks; nothing is read back from
it. Each editor is a run of its own there. Nothing leaves the machine: wandb stays offline, mlflow writes one file.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.core.events import content_id
from testbed.core.schema import EditReport, Record, folder_name
from testbed.storage.run_folder import StepResults

NEEDS = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
"""Packages that each tracker needs besides accelerate."""


@dataclass(frozen=True)
class TrackedRun:
    """One editor of a run, for a tracker."""

    out: Path
    """Run folder; trackers write beside the folders of the editors."""
    run: str
    editor: str
    config: Mapping[str, Any]
    """The stored configuration in JSON types."""

    @property
    def id(self) -> str:
        """The id of the tracker's run; a resumed run has the same."""
        return content_id("track", self.run, self.editor)


def missing(name: str) -> list[str]:
    """A sentence about the packages of a tracker that are not installed; empty when all are."""
    absent = [p for p in (*NEEDS[name], "accelerate") if importlib.util.find_spec(p) is None]
    return [f"--track {name} needs {', '.join(absent)}: pip install 'lifelong-editing-testbed[track]'"] if absent else []


@contextmanager
def tracking(name: str | None, run: TrackedRun) -> Generator[Callable[[StepResults], None]]:
    """A callback for the results that were just saved; without a name it does nothing."""
    if name is None:
        yield lambda results: None
        return
    from accelerate import PartialState  # imported here: an optional package

    PartialState(cpu=True)  # accelerate's trackers need it for their own log messages
    tracker = _TRACKERS[name](run)
    tracker.start()
    tracker.store_init_configuration({k: json.dumps(v) for k, v in run.config.items()})
    try:
        yield lambda results: _show(results, tracker)
    finally:
        tracker.finish()


def _show(results: StepResults, tracker: Any) -> None:
    for step, values in sorted(numbers(results).items()):
        tracker.log(values, step=step)


def numbers(results: StepResults) -> dict[int, dict[str, float]]:
    """Step to numbers by name.

    `PANEL/SPLIT/generated`: share of right free generations; `PANEL/SPLIT/tokens`: mean share of answer tokens that are
    the argmax under teacher forcing; `PANEL/SPLIT/all_tokens`: share of answers of which all are; `PANEL/text/nll`: nats
    per token of running text. An answer weighs 1 over the probability with which its panel included it. `cost/...`
    (seconds and bytes), `change/...`, `edits/...` and the `notes/...` of the editor come from its report of the step,
    `monitor/...` from the monitors.
    """
    out: dict[int, dict[str, float]] = defaultdict(dict)
    for report in results.reports:
        out[report.step] |= _of_report(report)
    panels: dict[tuple[int, str], list[Record]] = defaultdict(list)
    for r in results.records:
        panels[r.probe_step, f"{r.panel}/{r.split}"].append(r)
    for (step, panel), records in panels.items():
        out[step] |= {f"{panel}/{mode}": value for mode, value in _of_panel(records).items()}
    for m in results.monitors:
        out[m.step][f"monitor/{m.name}"] = m.value
    return dict(out)


def _of_report(report: EditReport) -> dict[str, float]:
    out = {"cost/seconds": report.seconds, "cost/peak_bytes": report.peak_bytes, "cost/state_bytes": report.state_bytes}
    out |= {"edits/asked": len(report.event_ids), "edits/failed": len(report.failed), "edits/skipped": len(report.skipped)}
    out |= {"change/norm": report.delta_norm} if report.delta_norm is not None else {}
    return out | {f"notes/{k}": v for k, v in report.notes.items()}


def _of_panel(records: list[Record]) -> dict[str, float]:
    """Weighted means by scoring mode; a mode that measured nothing is absent."""
    pairs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for r in records:
        weight = 1 / r.incl_prob
        if r.exact is not None:
            pairs["generated"].append((float(r.exact), weight))
        if r.token_hits is not None and r.n_tokens:
            pairs["tokens"].append((r.token_hits / r.n_tokens, weight))
            pairs["all_tokens"].append((float(r.token_hits == r.n_tokens), weight))
        if r.split == "text" and r.n_tokens:
            pairs["nll"].append((-(r.logprob or 0.0) / r.n_tokens, weight * r.n_tokens))
    return {mode: sum(v * w for v, w in known) / sum(w for _, w in known) for mode, known in pairs.items()}


def _tensorboard(run: TrackedRun) -> Any:
    """OUT/tensorboard/EDITOR; `tensorboard --logdir OUT/tensorboard` shows it."""
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker(folder_name(run.editor), run.out / "tensorboard")


def _wandb(run: TrackedRun) -> Any:
    """OUT/wandb; `wandb sync OUT/wandb/offline-run-*` sends it."""
    import wandb
    from accelerate.tracking import WandBTracker

    quiet = wandb.Settings(silent=True, console="off")
    names: dict[str, Any] = {"name": run.editor, "group": run.run, "id": run.id, "dir": str(run.out)}
    return WandBTracker("lifelong-editing-testbed", **names, mode="offline", settings=quiet, reinit="finish_previous")


def _mlflow(run: TrackedRun) -> Any:
    """OUT/mlflow.db; `mlflow ui --backend-store-uri sqlite:///OUT/mlflow.db` shows it. A resumed run continues its run there."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # mlflow reads it when it is imported
    import mlflow
    from accelerate.tracking import MLflowTracker

    mlflow.set_tracking_uri(f"sqlite:///{(run.out / 'mlflow.db').absolute()}")
    earlier: Any = mlflow.search_runs(search_all_experiments=True, filter_string=f"tags.testbed = '{run.id}'", output_format="list")
    known = earlier[0].info.run_id if earlier else None
    artifacts = (run.out / "mlflow").absolute().as_uri()
    return MLflowTracker(run.run, artifacts, known, {"testbed": run.id}, run_name=run.editor)


_TRACKERS: dict[str, Callable[[TrackedRun], Any]] = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
