"""Many runs: `python -m testbed.sweep sweep.yaml` runs a grid of editors, streams, models, seeds and settings on Ray.

Each cell of the grid is one task and one ordinary run folder. A task whose worker or node dies is started again and
goes on with its folder; a sweep that is started again skips what is finished. Nodes of a cluster must see the sweep's
folder, the model and the data under the same paths. See docs/sweeps.md.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from testbed.experiment.command import run_command
from testbed.experiment.config import BadConfig, set_fields
from testbed.run import read_yaml
from testbed.storage.files import StoreError, write_json
from testbed.sweeps.grid import Cell, Grid, expand, run_cell

_POLL_SECONDS = 1.0
_OBJECT_STORE_BYTES = 100 * 2**20
"""Tasks hand over configurations and messages, nothing large."""


@dataclass(frozen=True)
class SweepConfig:
    """Run a grid of editors, streams, models, seeds and settings, several at a time."""

    file: Annotated[Path, tyro.conf.Positional]
    """YAML file: fields of testbed.run, lists where there are several values; and any of the fields below."""
    out: Path | None = None
    """Folder of the sweep; by default runs/ and the name of the file. Finished cells in it are not run again."""
    address: str | None = None
    """A Ray cluster (auto, HOST:PORT); without it this machine alone."""
    cpus: int = 1
    """Processors of one run; it uses so many threads."""
    gpus: float = 0.0
    """GPUs of one run, a fraction where several share one. With 0, `device` is cpu unless the file says otherwise."""
    retries: int = 3
    """How often a run is started again whose worker or node died."""

    @property
    def place(self) -> Path:
        return self.out or Path("runs") / self.file.stem

    def problems(self) -> list[str]:
        """Every mistake, as sentences."""
        out = [f"cpus must be 1 or more, got {self.cpus}"] if self.cpus < 1 else []
        out += [f"gpus must be 0 or more, got {self.gpus}"] if self.gpus < 0 else []
        return out + ([f"retries must be 0 or more, got {self.retries}"] if self.retries < 0 else [])


@dataclass
class Board:
    """The state of each cell (waiting, running, done, failed), and why it failed; kept in OUT/sweep.json."""

    place: Path
    grid: Grid
    state: dict[str, str] = field(default_factory=dict)
    error: dict[str, str] = field(default_factory=dict)
    _logs: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = {i: "done" if cell.done else "waiting" for i, cell in self.grid.cells.items()}
        self._logs = {i: _size(cell.log) for i, cell in self.grid.cells.items()}
        self.save()

    def set(self, cell: Cell, error: str | None) -> None:
        self.state[cell.id] = "done" if error is None else "failed"
        if error is not None:
            self.error[cell.id] = error
        self.save()

    def look(self) -> None:
        """Which of the waiting cells have begun: their logs have grown."""
        waiting = [i for i, s in self.state.items() if s == "waiting"]
        self.state |= {i: "running" for i in waiting if _size(self.grid.cells[i].log) > self._logs[i]}

    def save(self) -> None:
        cells = {i: self._row(i, cell) for i, cell in self.grid.cells.items()}
        write_json(self.place / "sweep.json", {"comparisons": self.grid.comparisons, "cells": cells})

    def _row(self, name: str, cell: Cell) -> dict[str, Any]:
        folder = str(cell.folder.relative_to(self.place.absolute()))
        state = {"state": self.state[name], "error": self.error.get(name)}
        return {"editor": cell.editor, "seed": cell.config.seed, "folder": folder, **state, "config": cell.config.stored()}

    def table(self) -> Table:
        """One row a cell: what it is, its state, and how far its folder has come."""
        counts = Counter(self.state.values())
        table = Table(title=", ".join(f"{n} {s}" for s, n in sorted(counts.items())), box=None, title_justify="left")
        for head in ("editor", "seed", "state", "steps", ""):
            table.add_column(head)
        for name, cell in self.grid.cells.items():
            state = self.state[name]
            steps = f"{cell.step:,}" if state == "running" else ""
            apart = "; ".join(label for label, ids in self.grid.comparisons.items() if name in ids)
            # as texts: an editor's name may have brackets, which are rich's markup
            table.add_row(Text(cell.editor), str(cell.config.seed), Text(state, _STYLES[state]), steps, Text(apart))
        return table


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


_STYLES = {"waiting": "dim", "running": "cyan", "done": "green", "failed": "bold red"}


def sweep(config: SweepConfig, values: Mapping[str, Any], console: Console) -> Board:
    """Run every cell that is not finished.

    Args:
        values: fields of a run, as `testbed.sweeps.grid.expand` takes them.
        console: where the live table goes; nothing is shown where it is no terminal.

    Raises `BadConfig` and `StoreError` before anything is run. A cell that fails does not stop the others.
    """
    if problems := config.problems():
        raise BadConfig("\n".join(problems))
    ray = _library()
    grid = expand(values, config.place, "auto" if config.gpus else "cpu")
    _check_place(config.place)
    board = Board(config.place, grid)
    left = [c for c in grid.cells.values() if board.state[c.id] == "waiting"]
    if left:
        with _cluster(ray, config) as cluster, _live(board, console) as live:
            _check_room(cluster, config)
            for cell, error in _outcomes(cluster, config, left, live):
                board.set(cell, error)
    return board


def _library() -> Any:
    """Ray. Raises `BadConfig` where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when it is imported: it would report to its makers
    try:
        import ray
    except ImportError as e:
        raise BadConfig(f"ray is not installed ({e}): pip install 'lifelong-editing-testbed[sweep]'") from e
    return ray


def _check_place(place: Path) -> None:
    """Raise `StoreError` for a folder that holds anything but a sweep."""
    if place.exists() and not (place / "sweep.json").exists() and (not place.is_dir() or any(place.iterdir())):
        raise StoreError(f"{place} is not an empty folder and holds no sweep: choose another --out")


@contextmanager
def _cluster(ray: Any, config: SweepConfig) -> Iterator[Any]:
    """Ray, started on this machine or connected to a cluster. Raises `BadConfig` where there is none."""
    here = {"address": "local", "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        ray.init(**({"address": config.address} if config.address else here), log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError, TimeoutError) as e:
        where = f"at --address {config.address}" if config.address else "on this machine"
        raise BadConfig(f"Ray cannot be reached {where}: {e}") from e
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_room(ray: Any, config: SweepConfig) -> None:
    """Raise `BadConfig` where no node has what one run asks for: it would wait for ever."""
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    if not any(n.get("CPU", 0) >= config.cpus and n.get("GPU", 0) >= config.gpus for n in nodes):
        have = "; ".join(f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs" for n in nodes)
        raise BadConfig(f"no node has {config.cpus} CPUs and {config.gpus:g} GPUs for a run (nodes: {have}): lower cpus or gpus")


def _outcomes(ray: Any, config: SweepConfig, cells: Sequence[Cell], live: Any) -> Iterator[tuple[Cell, str | None]]:
    """Each cell with what went wrong in it, or None, as it ends."""
    # a process of its own for each run, so that its peak memory is its own
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
        live()


@contextmanager
def _live(board: Board, console: Console) -> Iterator[Any]:
    """A call that shows the table anew; nothing where nobody looks."""
    if not console.is_terminal:
        yield board.look
        return
    with Live(board.table(), console=console, transient=True) as live:

        def show() -> None:
            board.look()
            live.update(board.table())

        yield show


def parse(argv: Sequence[str] | None) -> tuple[SweepConfig, dict[str, Any]]:
    """The sweep's own fields (command line over file) and the fields of its runs. Raises `BadConfig`."""
    config = tyro.cli(SweepConfig, args=argv, prog="python -m testbed.sweep")
    values = read_yaml(config.file, f"the sweep {config.file}")
    own = {f.name for f in fields(SweepConfig)} - {"file"}
    stored = set_fields(config, {k: values.pop(k) for k in own & set(values)})
    return tyro.cli(SweepConfig, args=argv, prog="python -m testbed.sweep", default=stored), values


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 every cell is done, 1 some failed (the report names them), 2 a mistake of the user's, 130 interrupted."""
    start, console = time.perf_counter(), Console(stderr=True)

    def work() -> Board:
        config, values = parse(argv)
        return sweep(config, values, console)

    code, board = run_command(work, "the same command")
    if board is None:
        return code
    return _finish(board, time.perf_counter() - start)


def _finish(board: Board, seconds: float) -> int:
    """The report, and on screen what it says in short."""
    from analysis.reporting.sweep import write_sweep
    from analysis.reporting.tables import terminal_table

    code, summaries = run_command(lambda: write_sweep(board.place))
    out = Console()
    for label, summary in (summaries or {}).items():
        out.print(label, markup=False) if label else None
        out.print(terminal_table(summary))
    counts = Counter(board.state.values())
    out.print(f"{counts['done']} of {len(board.state)} cells done in {seconds:,.0f} s, {counts['failed']} failed", highlight=False)
    out.print(f"report: {board.place / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    for name, error in board.error.items():
        line = f"failed: {board.grid.cells[name].folder.name}: {error.strip().splitlines()[-1]}"
        Console(stderr=True).print(line, style="bold red", markup=False, highlight=False, soft_wrap=True)
    return code or (1 if board.error else 0)


if __name__ == "__main__":
    sys.exit(main())
