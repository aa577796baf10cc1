"""A small run with plug-ins, stopped in the middle and resumed: what probes, monitors and metrics are tried on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from testbed.checks.contract import require
from testbed.core.schema import folder_name
from testbed.experiment.config import RunConfig, stored_config
from testbed.experiment.interrupt import Stopped, StopRequest
from testbed.experiment.runner import study

CHANGES = ("seconds", "peak_bytes")
"""Fields that differ from run to run."""


@dataclass(frozen=True)
class RunCase:
    """A run of `config` that went through, and one that was stopped after half of its steps and resumed."""

    whole: Path
    resumed: Path
    editors: Sequence[str]

    def rows(self, folder: Path, kind: str) -> list[dict[str, Any]]:
        """The rows of the files `records` or `monitors` of all editors, without what differs from run to run."""
        paths = [p for e in self.editors for p in sorted((folder / folder_name(e) / kind).glob("*.parquet"))]
        return [{k: v for k, v in row.items() if k not in CHANGES} for p in paths for row in pq.read_table(p).to_pylist()]

    def summary(self) -> dict[str, Any]:
        return json.loads((self.whole / "summary.json").read_text("utf-8"))


class _StopAfter(StopRequest):
    """Asks for a stop when the loop has looked for one after this many steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    @property
    def requested(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        self.left -= 1
        return self.left <= 0

    def check(self, where: str) -> None:
        """Look for no stop before the first edit."""


@contextmanager
def run_case(config: RunConfig, steps: int = 2) -> Iterator[RunCase]:
    """Do the run twice in a folder that is removed afterwards; the second time it is stopped after some steps, and goes on."""
    with tempfile.TemporaryDirectory(prefix="testbed-check-") as root:
        whole, resumed = Path(root) / "whole", Path(root) / "resumed"
        study(replace(config, out=whole))
        try:
            study(replace(config, out=resumed), stop=_StopAfter(steps), report=False)
        except Stopped:
            study(stored_config(resumed), report=False)
        yield RunCase(whole, resumed, config.editor)


def a_run_that_was_stopped_and_resumed_is_the_uninterrupted_one(case: RunCase) -> None:
    for kind in ("records", "monitors"):
        one, two = case.rows(case.whole, kind), case.rows(case.resumed, kind)
        require(len(one) == len(two), f"the resumed run has {len(two)} rows of {kind}, the uninterrupted one {len(one)}")
        other = next((a for a, b in zip(one, two) if a != b), None)
        require(other is None, f"a row of {kind} differs after resuming: {other}")


def monitors_write_finite_numbers(case: RunCase) -> None:
    rows = case.rows(case.whole, "monitors")
    require(rows, "no monitor wrote a number")
    bad = [r for r in rows if not abs(r["value"]) < float("inf")]
    require(not bad, f"a number is not finite: leave out what has no value ({bad[:1]})")


CHECKS = (a_run_that_was_stopped_and_resumed_is_the_uninterrupted_one, monitors_write_finite_numbers)
"""Checks of every run; those below ask about one class."""


def a_probe_asks_something(case: RunCase, name: str) -> None:
    asked = {r["probe"] for r in case.rows(case.whole, "records")}
    require(name in asked, f"the probe asked nothing in a run with revisions and all splits; those that did: {', '.join(sorted(asked))}")


def a_metric_has_a_value(case: RunCase, name: str) -> None:
    summary = case.summary()
    failed = [n for n in summary["run"]["notes"] if f"the metric {name} failed" in n]
    require(not failed, "; ".join(failed))
    found = {e: [k for k in entries if k.startswith(name)] for e, entries in summary["editors"].items()}
    require(any(found.values()), "the metric has no value for any editor of the run")
