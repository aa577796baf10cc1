"""Many runs: `python -m testbed.sweep sweep.yaml` runs a grid of editors, streams, models, seeds and settings on Ray.

Each cell of the grid is one task and one ordinary run folder. A task whose worker or node dies starts again and resumes
its folder; a sweep that starts again skips finished cells. The nodes of a cluster must see the folder of the sweep, the
model and the data under the same paths. See docs/sweeps.md.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from testbed.core.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt, out_of_range
from testbed.core.terminal import ended_by_its_reader
from testbed.experiment.command import run_command
from testbed.experiment.config import BadConfig, set_fields
from testbed.model.progress import LINE_SECONDS
from testbed.run import read_yaml
from testbed.storage.files import StoreError, write_json
from testbed.sweeps.grid import Cell, Grid, expand, run_cell

_POLL_SECONDS = 1.0
_OBJECT_STORE_BYTES = 100 * 2**20
"""Small, because tasks exchange configurations and messages only."""


@dataclass(frozen=True)
class SweepConfig:
    """Run a grid of editors, streams, models, seeds and settings, several at a time."""

    file: Annotated[Path, tyro.conf.Positional]
    """YAML file: fields of testbed.run, lists where there are several values; and any of the fields below."""
    out: Path | None = None
    """Folder of the sweep; by default runs/ and the name of the file. Finished cells in it are not run again."""
    address: str | None = None
    """A Ray cluster (auto, HOST:PORT); without it this machine alone."""
    cpus: PositiveInt = 1
    """Processors of one run; it uses so many threads, which sleep while they wait."""
    gpus: NonNegativeFloat = 0.0
    """GPUs of one run, a fraction where several share one. With 0, `device` is cpu unless the file says otherwise."""
    retries: NonNegativeInt = 3
    """How often a run is started again whose worker or node died."""

    @property
    def folder(self) -> Path:
        """Folder of the sweep."""
        return self.out or Path("runs") / self.file.stem


@dataclass
class Board:
    """The state of each cell (waiting, running, done, failed) and the error of a failed one; kept in OUT/sweep.json."""

    folder: Path
    grid: Grid
    state: dict[str, str] = field(default_factory=dict)
    error: dict[str, str] = field(default_factory=dict)
    _logs: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = {i: "done" if cell.done else "waiting" for i, cell in self.grid.cells.items()}
        self._logs = {i: cell.log_size for i, cell in self.grid.cells.items()}
        self.save()

    def set(self, cell: Cell, error: str | None) -> None:
        """Note the end of a cell."""
        self.state[cell.id] = "done" if error is None else "failed"
        if error is not None:
            self.error[cell.id] = error
        self.save()

    def update(self) -> None:
        """Set waiting cells to running whose log has grown."""
        waiting = [i for i, s in self.state.items() if s == "waiting"]
        self.state |= {i: "running" for i in waiting if self.grid.cells[i].log_size > self._logs[i]}

    def save(self) -> None:
        """Write sweep.json. Raises `StoreError`."""
        cells = {}
        for i, cell in self.grid.cells.items():
            folder = str(cell.folder.relative_to(self.folder.absolute()))
            about = {"editor": cell.editor, "seed": cell.config.seed, "folder": folder, "config": cell.config.stored()}
            cells[i] = {**about, "state": self.state[i], "error": self.error.get(i)}
        write_json(self.folder / "sweep.json", {"comparisons": self.grid.comparisons, "cells": cells})

    def line(self) -> str:
        """How many cells are in each state, and the newest saved step of those that run."""
        counts = ", ".join(f"{n:,} {s}" for s, n in sorted(Counter(self.state.values()).items()))
        running = (self.grid.cells[i] for i, state in self.state.items() if state == "running")
        steps = [f"{c.editor} of order {c.config.seed} after step {c.step:,}" for c in running]
        return "; ".join([f"cells: {counts}", *steps])

    def table(self) -> Table:
        """One row per cell: its editor, seed, state, newest saved step and comparison."""
        counts = Counter(self.state.values())
        table = Table(title=", ".join(f"{n} {s}" for s, n in sorted(counts.items())), box=None, title_justify="left")
        for head in ("editor", "seed", "state", "steps", ""):
            table.add_column(head)
        for name, cell in self.grid.cells.items():
            state = self.state[name]
            steps = f"{cell.step:,}" if state == "running" else ""
            apart = "; ".join(label for label, ids in self.grid.comparisons.items() if name in ids)
            # Text, because the brackets in an editor's name would be markup of rich
            table.add_row(Text(cell.editor), str(cell.config.seed), Text(state, _STYLES[state]), steps, Text(apart))
        return table


_STYLES = {"waiting": "dim", "running": "cyan", "done": "green", "failed": "bold red"}


def sweep(config: SweepConfig, values: Mapping[str, Any], console: Console) -> Board:
    """Run every cell that is not finished.

    Args:
        values: fields of a run, as for `testbed.sweeps.grid.expand`.
        console: shows the live table if it is a terminal.

    Raises `BadConfig` and `StoreError` before the first run. A cell that fails does not stop the others.
    """
    if problems := out_of_range(config):
        raise BadConfig("\n".join(problems))
    ray = _import_ray()
    grid = expand(values, config.folder, "auto" if config.gpus else "cpu")
    free = not config.folder.exists() or (config.folder.is_dir() and not any(config.folder.iterdir()))
    if not free and not (config.folder / "sweep.json").exists():
        raise StoreError(f"{config.folder} is not an empty folder and holds no sweep: choose another --out")
    board = Board(config.folder, grid)
    left = [c for c in grid.cells.values() if board.state[c.id] == "waiting"]
    if left:
        with _cluster(ray, config), _live(board, console) as show:
            _check_resources(ray, config)
            for cell, error in _outcomes(ray, config, left, show):
                board.set(cell, error)
    return board


def _import_ray() -> Any:
    """Import ray, an optional package. Raises `BadConfig` where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # ray reads it when it is imported and would send usage reports
    try:
        import ray
    except ImportError as e:
        raise BadConfig(f"ray is not installed ({e}): pip install 'lifelong-editing-testbed[sweep]'") from e
    return ray


@contextmanager
def _cluster(ray: Any, config: SweepConfig) -> Generator[None]:
    """Start ray on this machine or connect it to a cluster. Raises `BadConfig` where neither succeeds."""
    here = {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        ray.init(**({"address": config.address} if config.address else here), log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as e:
        where = f"at --address {config.address}" if config.address else "on this machine"
        raise BadConfig(f"Ray cannot be reached {where}: {e}") from e
    try:
        yield
    finally:
        ray.shutdown()


def _check_resources(ray: Any, config: SweepConfig) -> None:
    """Raise `BadConfig` where no node has the resources of one run, because ray would wait for ever."""
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    if not any(n.get("CPU", 0) >= config.cpus and n.get("GPU", 0) >= config.gpus for n in nodes):
        have = "; ".join(f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs" for n in nodes)
        raise BadConfig(f"no node has {config.cpus} CPUs and {config.gpus:g} GPUs for a run (nodes: {have}): lower cpus or gpus")


def _outcomes(ray: Any, config: SweepConfig, cells: Sequence[Cell], show: Callable[[], None]) -> Iterator[tuple[Cell, str | None]]:
    """Run the cells; yield each with its error or None as it ends."""
    # max_calls=1: each run has a process of its own, so that its peak memory is its own
    task = ray.remote(num_cpus=config.cpus, num_gpus=config.gpus, max_retries=config.retries, max_calls=1)(run_cell)
    waiting = {task.remote(cell, config.cpus): cell for cell in cells}
    while waiting:
        ended, _ = ray.wait(list(waiting), timeout=_POLL_SECONDS)
        for reference in ended:
            cell = waiting.pop(reference)
            try:
                yield cell, ray.get(reference)
            except ray.exceptions.RayError as e:
                yield cell, f"{type(e).__name__}: {e}"
        show()


@contextmanager
def _live(board: Board, console: Console) -> Generator[Callable[[], None]]:
    """A function that updates the board and, on a terminal, its table; elsewhere it prints a line a minute."""
    if not console.is_terminal:
        printed = time.monotonic()

        def line() -> None:
            nonlocal printed
            board.update()
            if time.monotonic() - printed >= LINE_SECONDS:
                printed = time.monotonic()
                console.print(board.line(), markup=False, highlight=False, soft_wrap=True)

        yield line
        return
    with Live(board.table(), console=console, transient=True) as live:

        def show() -> None:
            board.update()
            live.update(board.table())

        yield show


def parse(argv: Sequence[str] | None) -> tuple[SweepConfig, dict[str, Any]]:
    """The fields of the sweep (the command line overrides the file) and those of its runs. Raises `BadConfig`."""
    config = tyro.cli(SweepConfig, args=argv, prog="python -m testbed.sweep")
    values = read_yaml(config.file, f"the sweep {config.file}")
    own = {f.name for f in fields(SweepConfig)} - {"file"}
    stored = set_fields(config, {k: values.pop(k) for k in own & set(values)})
    return tyro.cli(SweepConfig, args=argv, prog="python -m testbed.sweep", default=stored), values


@ended_by_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 every cell is done, 1 some failed (the report names them), 2 a mistake of the user, 130 interrupted."""
    start, console = time.perf_counter(), Console(stderr=True)
    code, board = run_command(lambda: sweep(*parse(argv), console), "the same command")
    return code if board is None else _finish(board, time.perf_counter() - start)


def _finish(board: Board, seconds: float) -> int:
    from analysis.reporting.sweep import write_sweep  # imported here: pandas and matplotlib are heavy, and --help needs neither
    from analysis.reporting.tables import terminal_table

    code, summaries = run_command(lambda: write_sweep(board.folder))
    out = Console()
    for label, summary in (summaries or {}).items():
        out.print(label, markup=False) if label else None
        out.print(terminal_table(summary))
    counts = Counter(board.state.values())
    out.print(f"{counts['done']} of {len(board.state)} cells done in {seconds:,.0f} s, {counts['failed']} failed", highlight=False)
    out.print(f"report: {board.folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    for name, error in board.error.items():
        line = f"failed: {board.grid.cells[name].folder.name}: {error.strip().splitlines()[-1]}"
        Console(stderr=True).print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)
    return code or (1 if board.error else 0)


if __name__ == "__main__":
    sys.exit(main())
