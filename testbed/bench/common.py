"""Parts that all tables of the bench share: options, clocks, every editor on every model in turn, and printing."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from streams.base import Stream
from testbed.bench.models import ModelTooLarge, open_model
from testbed.core.events import Ask, EditBatch, EditEvent
from testbed.core.ranges import NonNegativeInt, PositiveInt, out_of_range
from testbed.core.schema import EditReport
from testbed.core.timing import NOTE_PREFIX
from testbed.editors.base import Editor
from testbed.experiment.config import RunConfig
from testbed.model.handle import ModelHandle
from testbed.model.progress import bars

Rows = Iterator[list[Any]]
"""Rows of tables as they are measured. Each is a dataclass; those of one class form one table."""
Make = Callable[[], Editor]
"""Creates a fresh editor."""
T = TypeVar("T")


@dataclass(frozen=True)
class BenchConfig:
    """Measure editors: speed, probe cost, state size, peak memory."""

    what: tuple[str, ...] = ("editors",)
    """Tables, separated by commas: editors, paths, flops, questions, late, codebook, compare."""
    editor: tuple[str, ...] = RunConfig.editor
    """Editors, separated by commas."""
    model: tuple[str, ...] = ("tiny",)
    """Models, separated by commas: tiny, a folder, a hub id, or random weights of a published shape: random:gpt2-small, random:gpt2-xl,
    random:llama-3-8b, random:llava-1.5-7b, random:blip-2-opt-2.7b (a model that does not fit into memory is left out with a note)."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    dtype: str = "auto"
    """auto (float32 on CPU, bfloat16 on GPU), float32, bfloat16, float16."""
    stream: str = "okedit-yearly"
    """Stream of edits and questions."""
    text_stream: str = "world-yearly"
    """The same for models without images."""
    seed: int = 0
    """Seed of the stream."""
    edits: PositiveInt = 100
    """Edits per editor. In `paths` the reference implementation makes at most 4 of them; `late` makes them after those of the run."""
    plain: NonNegativeInt = 2
    """Edits of the reference implementation in `editors`; 0 leaves it out."""
    batch: PositiveInt | None = None
    """Edits in one batch; by default 16 in `paths`, 64 in `questions` and 1 in the other tables."""
    set: tuple[str, ...] = ()
    """editor.field=value, in all tables but `late` and `codebook`; versions that `compare` measures may derive other values."""
    plugin: tuple[str, ...] = ()
    """Python files or modules with editors or streams of your own, separated by commas, in all tables but `compare`."""
    questions: NonNegativeInt = 512
    """Questions asked of the edited model."""
    run: Path | None = None
    """Run folder that `late` reads."""
    at: PositiveInt = 500
    """Number of edits after which `late` takes the early state."""
    before: Path | None = None
    """Another version of the project (a git worktree) that `compare` measures against this one."""
    rounds: PositiveInt = 3
    """Measurements of each version in `compare`, of which the fastest counts."""
    threads: NonNegativeInt = 0
    """CPU threads; 0 leaves torch's own choice."""
    out: Path | None = None
    """JSON file to write."""

    def problems(self, tables: Collection[str]) -> list[str]:
        """Every mistake in the values, as sentences; `tables` are the known values of --what."""
        out = [f"--what {w!r} is not known; there are {', '.join(tables)}" for w in self.what if w not in tables]
        if "late" in self.what and self.run is None:
            out.append("--what late reads a run folder: give it with --run")
        if "compare" in self.what and (self.before is None or not (self.before / "testbed").is_dir()):
            out.append("--what compare needs another version of the project: give its folder with --before")
        if "compare" in self.what and self.plugin:
            out.append("--what compare measures another version of the project, which loads no --plugin")
        return out + [f"--{line}" for line in out_of_range(self)]

    def open_stream(self, reads_pictures: bool = True) -> Stream:
        name = self.stream if reads_pictures else self.text_stream
        return RunConfig(stream=name, seed=self.seed).resolve_stream().create()


def each_editor(measure: Callable[[ModelHandle, Stream, Make, BenchConfig], list[Any]], config: BenchConfig) -> Rows:
    """The rows of every editor on every model. What one editor caches on the model is dropped before the next."""
    with bars() as progress:
        for i, name in enumerate(config.model):
            try:
                handle = open_model(name, config.device, config.dtype)
            except ModelTooLarge as e:
                Console(stderr=True).print(f"left out: {e}", style="yellow", markup=False, highlight=False, soft_wrap=True)
                continue
            for j, editor in enumerate(config.editor, 1):
                handle.cache.clear()
                make = RunConfig(set=config.set).resolve_editor(editor).create
                yield measure(handle, config.open_stream(handle.reads_pictures), make, config)
                progress.advance("bench", i * len(config.editor) + j, len(config.model) * len(config.editor))


def apply_edits(editor: Editor, stream: Stream, events: Sequence[EditEvent], step: int) -> EditReport:
    """Make the edits in one batch, as the run does."""
    return editor.apply(EditBatch(tuple(events), step, {e.id: stream.paraphrases(e) for e in events}))


def stages_of(report: EditReport) -> dict[str, float]:
    """Wall seconds of a batch by stage."""
    return {k.removeprefix(NOTE_PREFIX): v for k, v in report.notes.items() if k.startswith(NOTE_PREFIX)}


def questions_about(handle: ModelHandle, stream: Stream, events: Sequence[EditEvent], n: int) -> tuple[list[Ask], list[str | None]]:
    """(n questions about the edits, their answers): with a picture for a model with images, otherwise without."""
    found = [q for e in events for q in stream.questions(e) if (q.image is not None) == handle.reads_pictures][:n]
    return [q.ask() for q in found], [q.answer for q in found]


def seconds_of(device: torch.device, work: Callable[[], T], wall: bool = False) -> tuple[float, T]:
    """The seconds of a piece of work up to the end of all work on the device, and its result.

    CPU time on a CPU, so that other processes do not count, otherwise wall time; with `wall` always wall time.
    """
    clock = time.process_time if device.type == "cpu" and not wall else time.perf_counter
    start, result = clock(), work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start, result


def table(rows: Sequence[Any]) -> Table:
    """Rows of one class as a terminal table with a column for each field."""
    names = _columns(rows[0])
    out = Table(*(n.replace("_per_second", "/s").replace("_", " ") for n in names), title=machine(), title_justify="left")
    for row in rows:
        out.add_row(*(_shown(n, getattr(row, n)) for n in names))
    return out


def as_json(row: Any) -> dict[str, Any]:
    """A row's fields, and the properties computed from them."""
    return asdict(row) | {n: getattr(row, n) for n in _columns(row)}


def _columns(row: Any) -> list[str]:
    return [f.name for f in fields(row)] + [n for n, v in vars(type(row)).items() if isinstance(v, property)]


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if "bytes" in name:
        return decimal(round(value))
    if name.startswith("share"):
        return f"{value:.2%}"
    if name.endswith("difference"):
        return f"{value:.1e}"
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def machine() -> str:
    """The processor, the threads in use and the versions that influence speed."""
    info = Path("/proc/cpuinfo")
    names = [x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    processor = names[0] if names else platform.processor() or platform.machine()
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, python {platform.python_version()}"
