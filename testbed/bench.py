"""`python -m testbed.bench`: edits a second, probe cost, state size, peak memory, for every editor and model.

Timings live here and never in tests. `--what` chooses the tables: `editors` (one fresh editor on one model a
line: a number of edits one at a time, then a panel of picture questions scored and generated through the
edited model), `paths` (each method beside its plain path: one edit, whole forwards and backwards, no cache),
`codebook` (insertion, retrieval and bytes by the number of entries), `locate` (locate-then-edit in batches
beside one edit at a time on the plain path, also on a random model of GPT-2 small's shape; the solve beside
dense ones).
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from streams.base import Stream
from testbed import _bench_codebook, _bench_locate, models, variants
from testbed._bench_paths import paths
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

    what: tuple[str, ...] = ("editors",)
    """Tables, separated by commas: editors, paths, codebook, locate."""
    editor: tuple[str, ...] = RunConfig.editor
    """Editors, separated by commas."""
    model: tuple[str, ...] = ("tiny",)
    """Models, separated by commas: tiny, a folder or a hub id."""
    stream: str = "okedit-yearly"
    """Where edits and questions come from."""
    seed: int = 0
    """Seed of the stream."""
    edits: int = 100
    """Edits per editor; a plain path makes at most 4 of them."""
    batch: int = 16
    """Edits trained at once, in `paths` and `locate`."""
    set: tuple[str, ...] = ()
    """editor.field=value, in `locate`."""
    questions: int = 512
    """Questions asked of the edited model."""
    threads: int = 0
    """CPU threads; 0 leaves torch's own choice."""
    out: Path | None = None
    """JSON file to write."""

    def problems(self) -> list[str]:
        unknown = [w for w in self.what if w not in TABLES]
        return [f"--what {w!r} is not known; there are {', '.join(TABLES)}" for w in unknown]


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
    args = [part for a in (sys.argv[1:] if argv is None else argv) for part in variants.names(a)]
    config = tyro.cli(BenchConfig, args=args, prog="python -m testbed.bench")
    if config.problems():
        print("\n".join(config.problems()), file=sys.stderr)
        return 2
    if config.threads:
        torch.set_num_threads(config.threads)
    console = Console()
    console = console if console.is_terminal else Console(width=_FILE_WIDTH)
    found = {name: TABLES[name](config) for name in config.what}
    for tables in found.values():
        for lines in tables:
            console.print(table(lines))
    if config.out:
        plain = {name: [_plain(x) for lines in tables for x in lines] for name, tables in found.items()}
        config.out.write_text(json.dumps({"machine": machine(), **plain}, indent=1) + "\n")
    return 0


def measure(config: BenchConfig) -> list[list[Line]]:
    """Every editor on every model, one after another."""
    return [_each(config, lambda handle, name: _line(config, handle, _stream(config), name))]


def measure_paths(config: BenchConfig) -> list[list[Any]]:
    """Every editor beside its plain path, on every model."""
    edits = min(4, config.edits)
    run = RunConfig()
    return [_each(config, lambda h, name: paths(h, _stream(config), lambda: make_editor(run, name), edits, config.batch))]


def measure_codebook(config: BenchConfig) -> list[list[Any]]:
    """Retrieval against the forward of each model and of a 7B shape, insertion, bytes."""
    shares = [x for name in config.model for x in _bench_codebook.tiny_share(models.load(name), _stream(config))]
    return [[*shares, *_bench_codebook.large_share()], _bench_codebook.insertion(), [_bench_codebook.weight()]]


def measure_locate(config: BenchConfig) -> list[list[Any]]:
    """Every editor in batches beside its plain path, on every model and on a random one of GPT-2 small's shape; the solve."""
    run, stream = RunConfig(set=config.set), _stream(config)
    lines = []
    for handle in (*map(models.load, config.model), _bench_locate.small_gpt2(models.load("tiny"))):
        lines += [_bench_locate.batches(handle, stream, lambda name=name: make_editor(run, name), config.batch) for name in config.editor]
    return [lines, [_bench_locate.solve()]]


TABLES: dict[str, Callable[[BenchConfig], list[list[Any]]]] = {
    "editors": measure,
    "paths": measure_paths,
    "codebook": measure_codebook,
    "locate": measure_locate,
}


def _each(config: BenchConfig, line: Callable[[models.ModelHandle, str], Any]) -> list[Any]:
    out = []
    with bars() as progress:
        for name in config.model:
            for editor in config.editor:
                out.append(line(models.load(name), editor))
                progress.advance("bench", len(out), len(config.model) * len(config.editor))
    return out


def _stream(config: BenchConfig) -> Stream:
    return STREAMS.get(config.stream)(RunConfig(stream=config.stream, seed=config.seed).stream_config())


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


def table(lines: Sequence[Any]) -> Table:
    """Measurements of one kind as a terminal table: a column a field, a row a line."""
    names = _columns(lines[0])
    out = Table(*(n.replace("_per_second", "/s").replace("_", " ") for n in names), title=machine(), title_justify="left")
    for x in lines:
        out.add_row(*(_shown(n, getattr(x, n)) for n in names))
    return out


def _columns(line: Any) -> list[str]:
    """Fields, then what is computed from them."""
    return [f.name for f in fields(line)] + [n for n, v in vars(type(line)).items() if isinstance(v, property)]


def _plain(line: Any) -> dict[str, Any]:
    return asdict(line) | {n: getattr(line, n) for n in _columns(line)}


_FILE_WIDTH = 200
"""Characters a line where the output is no terminal."""
_BYTES = {"state_bytes_per_edit", "peak_bytes", "keys", "values", "memory", "disk"}


def _shown(name: str, value: Any) -> str:
    if value is None:
        return "–"
    if name in _BYTES:
        return _size(value)
    if name == "share":
        return f"{value:.2%}"
    if name.endswith("difference"):
        return f"{value:.1e}"
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


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
