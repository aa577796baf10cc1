"""Benchmarks and editors for the tests of Avalanche."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from typing import Any

from tests.helpers.models import build
from tests.helpers.plain_stream import Line, PlainStream, plain

from testbed.integrations.avalanche import EditBenchmark, edit_benchmark  # isort: skip  (first, because it silences Avalanche's warnings at import)
from avalanche.logging import TextLogger
from avalanche.training.plugins import EvaluationPlugin

from streams.base import StreamConfig
from testbed.core.events import EditBatch
from testbed.core.registry import EDITORS
from testbed.editors.base import Editor
from testbed.editors.continual import methods

STILL = StreamConfig(edits_per_year=4, revise=0, revert=0, retire=0)
SMALL = {"steps": 5, "lr": 5e-2}


def settings(name: str, **more: Any) -> Any:
    """Settings of a short training in which the penalty of a regulariser has an effect."""
    strength = {"ewc": 100.0, "si": 100.0, "mas": 1e-2, "lwf": 1.0}
    own: dict[str, Any] = {"strength": strength[name]} if name in strength else {}
    config = methods.METHODS[name].config
    if "drop_revised" in {f.name for f in fields(config)}:
        own["drop_revised"] = False  # because Avalanche's own strategies never drop an edit
    return config(**{**SMALL, **own, **more})


@cache
def pictures() -> EditBenchmark:
    """Three years of four edits with pictures. Tests share it and must not change it."""
    return edit_benchmark("okedit-yearly", build("llava"), 12, config=STILL)


def words(n: int = 12, per_year: int = 4, revise_every: int = 0) -> EditBenchmark:
    return edit_benchmark(plain(n, per_year, revise_every), build("llama"), n)


@cache
def contrary() -> EditBenchmark:
    """Three years, of which each gives three questions new answers and adds a fact, so that their gradients conflict."""
    lines = [Line(1 + i / 10) for i in range(4)]
    for year in (2, 3):
        before = len(lines) - 4
        lines += [Line(year + i / 10, before + i, "revise", f"no {year} of {i}") for i in range(3)] + [Line(year + 0.5)]
    return edit_benchmark(PlainStream(lines), build("llama"), len(lines))


def quiet(*metrics: Any, **more: Any) -> Any:
    return EvaluationPlugin(*metrics, loggers=[TextLogger(open("/dev/null", "w"))], **more)


def editor(name: str, **more: Any) -> Any:
    return EDITORS.get(f"avalanche:{name}")(settings(name, **more))


def apply(e: Editor, groups: Sequence[Sequence[Any]], start: int = 1) -> list[Any]:
    return [e.apply(EditBatch(tuple(g), i)) for i, g in enumerate(groups, start)]
