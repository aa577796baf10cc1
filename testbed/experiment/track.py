"""Trackers: the numbers of a run shown to tensorboard, wandb or mlflow as the run goes (`--track`, extra [track]).

A tracker gets what was just saved, so it never shows a number that the run folder does not hold; nothing is read back
from it. Each editor is a run of its own there. wandb stays offline (`wandb sync` sends it), mlflow writes one file.
"""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.core.events import content_id
from testbed.core.schema import EditReport, Record, folder_name

if TYPE_CHECKING:
    from testbed.storage.run_folder import Found

NEEDS = {"tensorboard": ("tensorboard",), "wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
"""Packages that must be importable for each tracker."""
Log = Callable[[int, Mapping[str, float]], None]
"""Called with a step and its numbers by name."""
_BATCH = 1000
"""Most metrics that mlflow takes at once."""


@dataclass(frozen=True)
class About:
    """What a tracker is told of a run of one editor."""

    out: Path
    """Run folder; trackers write beside the editors' folders."""
    run: str
    editor: str
    config: Mapping[str, Any]
    """Fields and values, as JSON holds them."""

    @property
    def id(self) -> str:
        """The same when the run is gone on with."""
        return content_id("track", self.run, self.editor)


def missing(name: str) -> list[str]:
    """A sentence where packages of a tracker are not installed."""
    absent = [p for p in NEEDS[name] if importlib.util.find_spec(p) is None]
    return [f"--track {name} needs {', '.join(absent)}: pip install 'lifelong-editing-testbed[track]'"] if absent else []


@contextmanager
def tracking(name: str | None, about: About) -> Iterator[Callable[[Found], None]]:
    """What to call with everything that was just saved; without a name it does nothing."""
    if name is None:
        yield lambda found: None
        return
    with _OPEN[name](about) as log:
        yield lambda found: _show(found, log)


def _show(found: Found, log: Log) -> None:
    for step, values in sorted(numbers(found).items()):
        log(step, values)


def numbers(found: Found) -> dict[int, dict[str, float]]:
    """Step to numbers by name.

    `PANEL/SPLIT/generated`: share of right free generations; `PANEL/SPLIT/tokens`: mean share of answer tokens that are
    the argmax under teacher forcing; `PANEL/SPLIT/all_tokens`: share of answers of which all are; `PANEL/text/nll`: nats
    a token of running text. Answers count with 1 over the probability with which their panel drew them. `cost/...`
    (seconds and bytes), `change/...`, `edits/...` and the editor's own `notes/...` come from its report of the step,
    `monitor/...` from the monitors.
    """
    out: dict[int, dict[str, float]] = defaultdict(dict)
    for report in found.reports:
        out[report.step] |= _of_report(report)
    panels: dict[tuple[int, str], list[Record]] = defaultdict(list)
    for r in found.records:
        panels[r.probe_step, f"{r.panel}/{r.split}"].append(r)
    for (step, place), records in panels.items():
        out[step] |= {f"{place}/{reading}": value for reading, value in _of_panel(records).items()}
    for m in found.monitors:
        out[m.step][f"monitor/{m.name}"] = m.value
    return dict(out)


def _of_report(report: EditReport) -> dict[str, float]:
    out = {"cost/seconds": report.seconds, "cost/peak_bytes": report.peak_bytes, "cost/state_bytes": report.state_bytes}
    out |= {"edits/asked": len(report.event_ids), "edits/failed": len(report.failed), "edits/skipped": len(report.skipped)}
    out |= {"change/norm": report.delta_norm} if report.delta_norm is not None else {}
    return out | {f"notes/{k}": v for k, v in report.notes.items()}


def _of_panel(records: list[Record]) -> dict[str, float]:
    """Weighted means of what was measured; a reading that was not is absent."""
    weights = [1 / r.incl_prob for r in records]
    exact = [None if r.exact is None else float(r.exact) for r in records]
    tokens = [None if r.token_hits is None or not r.n_tokens else r.token_hits / r.n_tokens for r in records]
    whole = [None if t is None else float(t == 1) for t in tokens]
    out = {"generated": _mean(exact, weights), "tokens": _mean(tokens, weights), "all_tokens": _mean(whole, weights)}
    texts = [(w * (r.logprob or 0.0), w * r.n_tokens) for w, r in zip(weights, records) if r.split == "text" and r.n_tokens]
    out |= {"nll": -sum(p for p, _ in texts) / sum(n for _, n in texts)} if texts else {}
    return {k: v for k, v in out.items() if v is not None}


def _mean(values: list[float | None], weights: list[float]) -> float | None:
    known = [(v, w) for v, w in zip(values, weights) if v is not None]
    return sum(v * w for v, w in known) / sum(w for _, w in known) if known else None


@contextmanager
def _tensorboard(about: About) -> Iterator[Log]:
    """OUT/tensorboard/EDITOR; `tensorboard --logdir OUT/tensorboard` shows it."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(about.out / "tensorboard" / folder_name(about.editor))
    writer.add_text("config", f"```\n{json.dumps(about.config, indent=1, sort_keys=True)}\n```")

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def _wandb(about: About) -> Iterator[Log]:
    """OUT/wandb; `wandb sync OUT/wandb/offline-run-*` sends it."""
    import wandb

    quiet = wandb.Settings(silent=True, console="off")
    names: dict[str, Any] = {"project": "lifelong-editing-testbed", "name": about.editor, "group": about.run, "id": about.id}
    run: Any = wandb.init(**names, dir=str(about.out), mode="offline", config=dict(about.config), settings=quiet, reinit="finish_previous")
    try:
        yield lambda step, values: run.log(dict(values), step=step)
    finally:
        run.finish()


@contextmanager
def _mlflow(about: About) -> Iterator[Log]:
    """OUT/mlflow.db; `mlflow ui --backend-store-uri sqlite:///OUT/mlflow.db` shows it."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # offline is offline; read when mlflow is imported
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    client = MlflowClient(f"sqlite:///{(about.out / 'mlflow.db').absolute()}")
    run = _mlflow_run(client, about)
    params = [Param(k, json.dumps(v)[:500]) for k, v in about.config.items()]

    def log(step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in values.items()]
        for at in range(0, len(metrics), _BATCH):
            client.log_batch(run, metrics[at : at + _BATCH])

    client.log_batch(run, params=params)
    try:
        yield log
    finally:
        client.set_terminated(run)


def _mlflow_run(client: Any, about: About) -> str:
    """The run's id there: the one from before where the run is gone on with."""
    known = client.get_experiment_by_name(about.run)
    place = (about.out / "mlflow").absolute().as_uri()
    experiment = known.experiment_id if known else client.create_experiment(about.run, artifact_location=place)
    earlier = client.search_runs([experiment], f"tags.testbed = '{about.id}'")
    if earlier:
        return earlier[0].info.run_id
    return client.create_run(experiment, run_name=about.editor, tags={"testbed": about.id}).info.run_id


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
