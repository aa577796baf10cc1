"""The grid of a sweep: every field of a run may have several values, and each combination is one cell.

A cell runs one editor, and its folder is an ordinary run folder. Its id is a hash of its configuration, so it does not
depend on the order of fields and values in the file, and a grid that grows keeps its cells.
"""

from __future__ import annotations

import difflib
import itertools
import os
import socket
import traceback
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from testbed.core import threads, variants
from testbed.core.events import content_id
from testbed.core.schema import folder_name
from testbed.experiment.command import user_errors
from testbed.experiment.config import COMMON, BadConfig, RunConfig, plain, set_fields, setting_owner, type_hints
from testbed.storage.files import step_of

RESERVED = frozenset({"out", "resume", "config", "log", "dry_run", "list", "save_model", "cache"})
"""Fields of a run that a sweep sets itself, or that have no meaning for many runs."""
_WITHIN = ("editor", "seed")
"""Fields that differ inside one comparison: editors are compared, seeds are pooled as orders of one stream."""


@dataclass(frozen=True)
class Cell:
    """One run of one editor."""

    id: str
    config: RunConfig
    folder: Path
    """The run folder, which is `config.out`."""

    @property
    def editor(self) -> str:
        return self.config.editor[0]

    @property
    def done(self) -> bool:
        """True for a finished run: the report is the last file that a run writes."""
        return (self.folder / "report.html").is_file()

    @property
    def begun(self) -> bool:
        """True for a run that can be resumed."""
        return (self.folder / "manifest.json").is_file()

    @property
    def log(self) -> Path:
        """The log of its runs: start and resumption with the host, stand-ins, skipped records, and a line a minute on the progress."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def say(self, line: str) -> None:
        """Append a line to the log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a", encoding="utf-8") as f:
            f.write(line + "\n")

    @property
    def log_size(self) -> int:
        return self.log.stat().st_size if self.log.is_file() else 0

    @property
    def step(self) -> int:
        """The newest saved step; 0 without one."""
        return max((step_of(p) for p in self.folder.glob("*/state/step-*.safetensors")), default=0)


@dataclass(frozen=True)
class Grid:
    """All cells and comparisons of a sweep."""

    cells: dict[str, Cell]
    """By id, in the order of their start."""
    comparisons: dict[str, list[str]]
    """Ids of the cells by the label of the comparison."""


def expand(values: Mapping[str, Any], out: Path, device: str = "auto") -> Grid:
    """The grid of a sweep.

    Args:
        values: fields of `RunConfig`. A list gives several values to a field of one value; a list of lists does so to a
            field that is itself a list (`set`, `benchmarks`); each editor is one value.
        out: folder of the sweep.
        device: the default of the field `device`.

    Editors are the slowest axis, so that cells with the same answers of the unedited model do not start all at once.
    A setting of an editor (`set: [finetune.lr=1e-3]`) applies to the cells of that editor. Raises `BadConfig` with every
    mistake at once.
    """
    _check_names(values)
    given = {"device": device, "editor": list(RunConfig().editor), **values}
    axes = {name: _choices(name, given[name]) for name in sorted(given, key=lambda n: (n != "editor", n))}
    editors = {variants.names(e)[0].partition("[")[0] for (e,) in axes["editor"]}
    cells: dict[str, Cell] = {}
    comparisons: dict[str, list[str]] = {}
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination))
        _check_owners(chosen.get("set", ()), editors)
        cell = _cell(chosen, out)
        cells.setdefault(cell.id, cell)
        members = comparisons.setdefault(_label(chosen, axes), [])
        members += [cell.id] if cell.id not in members else []
    if problems := dict.fromkeys(p for cell in cells.values() for p in cell.config.problems()):
        raise BadConfig("\n".join(problems))
    return Grid(cells, comparisons)


def _check_names(values: Mapping[str, Any]) -> None:
    known = sorted({f.name for f in fields(RunConfig)} - RESERVED)
    wrong = []
    for name in values:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        if name in RESERVED:
            wrong.append(f"{name} cannot stand in a sweep, which gives it to each cell")
        elif name not in known:
            wrong.append(f"a sweep has no field {name!r}.{hint} There are: {', '.join(known)}.")
    if wrong:
        raise BadConfig("\n".join(wrong))


def _choices(name: str, value: Any) -> list[Any]:
    """The values of one field. Raises `BadConfig` for an empty list and for editors that are no names."""
    if name == "editor":
        names = variants.names(value) if isinstance(value, str) else value
        if not isinstance(names, (list, tuple)) or not all(isinstance(e, str) for e in names):
            raise BadConfig(f"editor must be a name or a list of names, got {value!r}")
        found: list[Any] = [[e] for e in names if e]
    elif typing.get_origin(type_hints(RunConfig)[name]) is tuple:
        several = isinstance(value, list) and any(isinstance(v, list) for v in value)
        found = [v if isinstance(v, list) else [v] for v in value] if several else [value]
    else:
        found = value if isinstance(value, list) else [value]
    if not found:
        raise BadConfig(f"{name} names no value")
    return found


def _cell(chosen: Mapping[str, Any], out: Path) -> Cell:
    config = set_fields(RunConfig(), chosen)
    owners = {*COMMON, config.editor[0].partition("[")[0]}
    kept = tuple(s for s in config.set if setting_owner(s) in (*owners, ""))
    data_root = config.data_root.absolute() if config.data_root is not None else None
    files = tuple(p.absolute() if p.exists() else p for p in config.benchmarks)  # a suite is a name and no path
    # absolute, because a worker has another working directory; a hub id is no folder
    model = str(Path(config.model).absolute()) if Path(config.model).is_dir() else config.model
    plugins = tuple(str(Path(p).absolute()) if Path(p).is_file() else p for p in config.plugin)
    paths = {"data_root": data_root, "model": model, "benchmarks": files, "plugin": plugins}
    config = replace(config, set=kept, **paths)
    name = content_id("cell", config.stored())[:12]
    folder = out.absolute() / "cells" / f"{folder_name(config.editor[0])}-{config.seed}-{name}"
    return Cell(name, replace(config, out=folder, cache=out.absolute() / "shared"), folder)


def _check_owners(settings: Any, editors: set[str]) -> None:
    known = {*COMMON, *editors, ""}
    strangers = sorted({setting_owner(s) for s in set_fields(RunConfig(), {"set": settings}).set} - known)
    if strangers:
        raise BadConfig(f"set names {', '.join(strangers)}, which takes part in no cell ({', '.join(sorted(known - {''}))})")


def _label(chosen: Mapping[str, Any], axes: Mapping[str, Sequence[Any]]) -> str:
    """The label of a comparison: its value on every axis with several values; "" where there is one comparison only."""
    apart = {n: plain(v) for n, v in chosen.items() if n not in _WITHIN and len(axes[n]) > 1}
    return ", ".join(f"{n}={' '.join(map(str, v)) if isinstance(v, list) else v}" for n, v in apart.items())


def run_cell(cell: Cell, cpus: int) -> str | None:
    """Run a cell or resume it, in a process of its own with `cpus` threads.

    Returns None for a finished run, else the error: a sentence for a mistake of the user, a traceback for any other error.
    A lock keeps a cell for one process at a time, because a worker that lost its connection may still run when its
    successor starts.
    """
    threads.prepare(cpus)
    import torch  # imported here, as the modules below that import it: --help of a sweep is faster without it

    from testbed.experiment import runner
    from testbed.model.progress import bars
    from testbed.storage.shared_cache import exclusive

    torch.set_num_threads(cpus)
    with exclusive(cell.folder):
        if cell.done:
            return None
        config = replace(cell.config, out=None, resume=cell.folder) if cell.begun else cell.config
        cell.say(f"{'resumed' if cell.begun else 'started'} on {socket.gethostname()}, process {os.getpid()}")
        try:
            with bars(cell.say):
                runner.study(config, cell.say)
        except user_errors() as e:
            return str(e)
        except Exception:
            return traceback.format_exc()
    return None
