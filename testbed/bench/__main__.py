"""`python -m testbed.bench`: edits a second, probe cost, state size, peak memory, for every editor and model.

Timings live here and never in tests. `--what` chooses the tables: `editors` (one fresh editor on one model a
line: a number of edits, one at a time or `--batch` at once, beside the method's plain path, seconds by stage, then
a panel of questions scored and generated through the edited model, bytes kept), `long` (the cost of an edit late against early, from
the reports of a run), `late` (the same edits and questions by an editor as it was early in a run and as it is now,
in turn), `paths` (each method beside its plain path: one edit, whole forwards and backwards, no cache),
`codebook` (insertion, retrieval and bytes by the number of entries), `locate` (locate-then-edit in batches
beside one edit at a time on the plain path, also on a random model of GPT-2 small's shape; the solve beside
dense ones), `floors` (each stage of an edit and of a question beside the least that its matrix products take on
this machine; wants an otherwise idle machine).
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from streams.base import Stream
from testbed.bench import codebook as _bench_codebook
from testbed.bench import locate as _bench_locate
from testbed.bench.editors import Amount, line
from testbed.bench.floor import Machine
from testbed.bench.hot import hot_paths
from testbed.bench.late import lates
from testbed.bench.long import costs, wholes
from testbed.bench.models import NoRoom, open_model
from testbed.bench.paths import paths
from testbed.core import variants
from testbed.experiment.command import run_command
from testbed.experiment.config import RunConfig
from testbed.model import loading
from testbed.model.handle import ModelHandle
from testbed.model.progress import bars
from testbed.storage.files import replacing


@dataclass(frozen=True)
class BenchConfig:
    """Measure editors: speed, probe cost, state size, peak memory."""

    what: tuple[str, ...] = ("editors",)
    """Tables, separated by commas: editors, long, late, paths, codebook, locate, floors."""
    editor: tuple[str, ...] = RunConfig.editor
    """Editors, separated by commas."""
    model: tuple[str, ...] = ("tiny",)
    """Models, separated by commas: tiny, a folder, a hub id, or random weights of a published shape: random:gpt2-small, random:gpt2-xl,
    random:llama-3-8b, random:llava-1.5-7b, random:blip-2-opt-2.7b (what memory has no room for is left out and said)."""
    device: str = "auto"
    """auto, cpu, cuda, ..."""
    dtype: str = "auto"
    """auto (float32 on CPU, bfloat16 on GPU), float32, bfloat16, float16."""
    stream: str = "okedit-yearly"
    """Where edits and questions come from."""
    text_stream: str = "world-yearly"
    """The same for models that read no pictures."""
    seed: int = 0
    """Seed of the stream."""
    edits: int = 100
    """Edits per editor; the plain path of `paths` makes at most 4 of them, in `late` an editor makes them behind those of the run."""
    plain: int = 2
    """Edits on the plain path in `editors`; 0 leaves it out."""
    batch: int | None = None
    """Edits made at once: 16 in `paths` and `locate` and 1 in `editors`, if not given."""
    set: tuple[str, ...] = ()
    """editor.field=value, in `locate`, `editors` and `floors`."""
    questions: int = 512
    """Questions asked of the edited model."""
    run: Path | None = None
    """Run folder that `long` and `late` read."""
    at: tuple[int, ...] = (500, 5000)
    """Edits made, at which `long` looks; `late` takes the first of them and the end."""
    threads: int = 0
    """CPU threads; 0 leaves torch's own choice."""
    out: Path | None = None
    """JSON file to write."""

    def problems(self) -> list[str]:
        unknown = [f"--what {w!r} is not known; there are {', '.join(TABLES)}" for w in self.what if w not in TABLES]
        needs = [f"--what {w} reads a run folder: give it with --run" for w in self.what if w in ("long", "late") and self.run is None]
        return unknown + needs


Tables = Iterator[list[Any]]
"""Lines as they are measured; those of one kind make one table."""


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
    found: dict[str, list[Any]] = {}
    code, _ = run_command(lambda: _fill(found, config), "the same command: it begins anew")
    for lines in found.values():
        for kind in dict.fromkeys(map(type, lines)):
            console.print(table([x for x in lines if type(x) is kind]))
    return code


def _fill(found: dict[str, list[Any]], config: BenchConfig) -> None:
    """Measure; what is measured is in `found`, and in the file, whatever happens later."""
    for name in config.what:
        for lines in TABLES[name](config):
            found.setdefault(name, []).extend(lines)
            if config.out:
                with replacing(config.out) as temporary:
                    plain = {what: [_plain(x) for x in measured] for what, measured in found.items()}
                    temporary.write_text(json.dumps({"machine": machine(), **plain}, indent=1) + "\n")


def measure(config: BenchConfig) -> Tables:
    """Every editor on every model, one after another."""
    run, amount = RunConfig(set=config.set), Amount(config.edits, config.plain, config.questions, config.batch or 1)
    yield from _each(config, lambda h, name: [line(h, _stream(config, h), lambda: run.resolve_editor(name).create(), amount)])


def measure_long(config: BenchConfig) -> Tables:
    """What an edit and a question cost at each point of a run, and where its minutes went."""
    if config.run:
        yield costs(config.run, config.at)
        yield wholes(config.run)


def measure_late(config: BenchConfig) -> Tables:
    """Every editor of a run as it was early and as it is now."""
    if config.run:
        yield from ([x] for x in lates(config.run, config.at[0], config.edits, config.questions))


def measure_paths(config: BenchConfig) -> Tables:
    """Every editor beside its plain path, on every model."""
    edits, batch = min(4, config.edits), config.batch or _AT_ONCE
    run = RunConfig()
    yield from _each(config, lambda h, name: [paths(h, _stream(config, h), lambda: run.resolve_editor(name).create(), edits, batch)])


def measure_codebook(config: BenchConfig) -> Tables:
    """Retrieval against the forward of each model and of a 7B shape, insertion, bytes."""
    for name in config.model:
        yield _bench_codebook.tiny_share(loading.load(name), _stream(config))
    yield _bench_codebook.large_share()
    yield _bench_codebook.insertion()
    yield [_bench_codebook.weight()]


def measure_locate(config: BenchConfig) -> Tables:
    """Every editor in batches beside its plain path, on every model and on a random one of GPT-2 small's shape; the solve."""
    run = RunConfig(set=config.set)
    for handle in (*map(loading.load, config.model), _bench_locate.small_gpt2(loading.load("tiny"))):
        stream = _stream(config, handle)
        for name in config.editor:
            yield [_bench_locate.batches(handle, stream, lambda name=name: run.resolve_editor(name).create(), config.batch or _AT_ONCE)]
    yield [_bench_locate.solve()]


def measure_floors(config: BenchConfig) -> Tables:
    """Every stage of every editor on every model, beside the floor of its matrix products; then what the machine can do."""
    run, amount, machines = RunConfig(set=config.set), Amount(config.edits, config.plain, config.questions), dict[str, Machine]()

    def each(handle: ModelHandle, name: str) -> list[Any]:
        machine = machines.setdefault(str(handle.device), Machine(handle.device))
        return hot_paths(handle, _stream(config, handle), lambda: run.resolve_editor(name).create(), amount, machine)

    yield from _each(config, each)
    yield [m.rates() for m in machines.values()]


TABLES: dict[str, Callable[[BenchConfig], Tables]] = {
    "editors": measure,
    "long": measure_long,
    "late": measure_late,
    "paths": measure_paths,
    "codebook": measure_codebook,
    "locate": measure_locate,
    "floors": measure_floors,
}


def _each(config: BenchConfig, measured: Callable[[ModelHandle, str], list[Any]]) -> Tables:
    """The lines of each editor and model; nothing that one editor left on the model spares the next its work."""
    done, total = 0, len(config.model) * len(config.editor)
    with bars() as progress:
        for name in config.model:
            handle = _opened(config, name)
            if handle is None:
                total -= len(config.editor)
                continue
            for editor in config.editor:
                handle.cache.clear()
                yield measured(handle, editor)
                done += 1
                progress.advance("bench", done, total)


def _opened(config: BenchConfig, name: str) -> ModelHandle | None:
    """The model, or None where memory has no room for it, which is said."""
    try:
        return open_model(name, config.device, config.dtype)
    except NoRoom as e:
        Console(stderr=True).print(f"left out: {e}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        return None


def _stream(config: BenchConfig, handle: ModelHandle | None = None) -> Stream:
    name = config.stream if handle is None or handle.reads_pictures else config.text_stream
    return RunConfig(stream=name, seed=config.seed).resolve_stream().create()


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


_AT_ONCE = 16
"""Edits made at once in `paths` and `locate`."""
_FILE_WIDTH = 200
"""Characters a line where the output is no terminal."""
_BYTES = {"state_bytes_per_edit", "peak_bytes", "keys", "values", "memory", "disk", "cache"}


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
