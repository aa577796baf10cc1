"""`python -m testbed.bench`: edits a second, probe cost, state size, peak memory, for every editor and model.

Timings live here and never in tests. Each line of the table is one fresh editor on one model: a number of
edits one at a time, then a panel of picture questions scored and generated through the edited model.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from streams.base import Stream
from testbed import models
from testbed.config import RunConfig
from testbed.encode import Ask
from testbed.events import EditBatch
from testbed.loop import peak_bytes
from testbed.predictor import Predictor
from testbed.progress import bars
from testbed.registry import STREAMS
from testbed.runner import make_editor


@dataclass(frozen=True)
class BenchConfig:
    """Measure editors: speed, probe cost, state size, peak memory."""

    editor: tuple[str, ...] = RunConfig.editor
    """Editors, separated by commas."""
    model: tuple[str, ...] = ("tiny",)
    """Models, separated by commas: tiny, a folder or a hub id."""
    stream: str = "okedit-yearly"
    """Where edits and questions come from."""
    edits: int = 100
    """Edits per editor."""
    questions: int = 512
    """Questions asked of the edited model."""
    threads: int = 0
    """CPU threads; 0 leaves torch's own choice."""
    out: Path | None = None
    """JSON file to write."""


@dataclass(frozen=True)
class Line:
    """One editor on one model."""

    model: str
    editor: str
    edits: int
    edits_per_second: float
    questions_per_second: float
    """Scored and generated, after the edits, prompts already tokenised once."""
    questions_per_second_first: float
    """The same with nothing cached: tokenising, decoding and seeing each picture for the first time."""
    state_bytes_per_edit: float
    peak_bytes: int


def main(argv: list[str] | None = None) -> int:
    import tyro
    from transformers.utils import logging

    logging.disable_progress_bar()
    args = [part for a in (sys.argv[1:] if argv is None else argv) for part in a.split(",")]
    config = tyro.cli(BenchConfig, args=args, prog="python -m testbed.bench")
    if config.threads:
        torch.set_num_threads(config.threads)
    lines = measure(config)
    Console().print(table(lines))
    if config.out:
        config.out.write_text(json.dumps({"machine": machine(), "lines": [asdict(x) for x in lines]}, indent=1) + "\n")
    return 0


def measure(config: BenchConfig) -> list[Line]:
    """Every editor on every model, one after another."""
    out = []
    with bars() as progress:
        for name in config.model:
            for editor in config.editor:
                handle = models.load(name)
                stream = STREAMS.get(config.stream)(RunConfig(stream=config.stream).stream_config())
                out.append(_line(config, handle, stream, editor))
                progress.advance("bench", len(out), len(config.model) * len(config.editor))
    return out


def _line(config: BenchConfig, handle: models.ModelHandle, stream: Stream, name: str) -> Line:
    events = stream.events(config.edits)
    asks = [Ask(q.prompt, q.image) for e in events for q in stream.questions(e) if q.image is not None or not handle.reads_pictures]
    answers = [q.answer for e in events for q in stream.questions(e) if q.image is not None or not handle.reads_pictures]
    asks, answers = asks[: config.questions], answers[: config.questions]
    editor = make_editor(RunConfig(), name)
    editor.prepare(handle, stream.train_pool())
    start = time.perf_counter()
    report = None
    for i, e in enumerate(events, 1):
        report = editor.apply(EditBatch((e,), i, {e.id: stream.paraphrases(e)}))
    seconds = time.perf_counter() - start
    handle.cache.clear()
    first, again = (_ask_speed(editor.predictor(), asks, answers) for _ in range(2))
    state = report.state_bytes if report else 0
    speeds = (len(events) / seconds, again, first)
    return Line(handle.name, name, len(events), *speeds, state / max(1, len(events)), peak_bytes(handle.device))


def _ask_speed(predictor: Predictor, asks: list[Ask], answers: list[str | None]) -> float:
    start = time.perf_counter()
    predictor.respond(asks, answers, 16)
    return len(asks) / (time.perf_counter() - start)


def table(lines: list[Line]) -> Table:
    """The measurements as a terminal table."""
    out = Table(
        "model", "editor", *(["edits/s", "questions/s", "first time", "state/edit", "peak memory"]), title=machine(), title_justify="left"
    )
    for x in lines:
        numbers = (x.edits_per_second, x.questions_per_second, x.questions_per_second_first)
        out.add_row(x.model, x.editor, *(f"{v:,.1f}" for v in numbers), _size(x.state_bytes_per_edit), _size(x.peak_bytes))
    return out


def _size(n: float) -> str:
    for unit in ("B", "KB", "MB"):
        if n < 1024:
            return f"{n:.0f} {unit}"
        n /= 1024
    return f"{n:.1f} GB"


def machine() -> str:
    """The processor, its threads in use and the versions that matter."""
    return f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, python {platform.python_version()}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names: Any = [x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
