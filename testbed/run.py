"""The command line: `python -m testbed.run --stream okedit-yearly`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import tyro
import yaml
from rich.console import Console
from rich.table import Table

from testbed.core import threads, variants
from testbed.core.plugins import load_plugins
from testbed.core.registry import EDITORS, METRICS, MONITORS, PROBES, STREAMS, WRAPPERS
from testbed.core.terminal import ended_by_its_reader
from testbed.experiment.command import run_command
from testbed.experiment.config import BadConfig, RunConfig, set_fields, stored_config
from testbed.experiment.interrupt import StopRequest
from testbed.experiment.protocols import defaults_of
from testbed.storage.run_folder import RunFolder


@ended_by_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 2 for a mistake of the user (printed as a plain line), 130 interrupted, 143 stopped by SIGTERM (after
    the step in hand, with everything saved)."""
    console = Console(stderr=True)
    code, _ = run_command(lambda: _main(list(sys.argv[1:] if argv is None else argv), console))
    return code


def _main(argv: list[str], console: Console) -> None:
    config = parse(argv)
    if config.list:
        load_plugins(config.plugin)
        list_plugins(Console())
        return

    def say(line: str) -> None:
        console.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)

    several = config.edits >= _MANY and config.device in ("auto", "cpu") and not threads.has_gpu()
    jobs = config.jobs or (threads.processes(len(config.editor)) if several else 1)
    config = replace(config, jobs=jobs)
    stored = RunFolder(config.resume).manifest().get("threads") if config.resume else None  # a manifest of an older version has none
    if line := threads.prepare(stored, min(jobs, len(config.editor))):
        say(line)
    # torch, transformers and pandas are imported from here on, so that --help is fast and OpenMP reads its settings late enough
    from transformers.utils import logging

    from analysis.reporting.tables import protocol_tables, terminal_table
    from testbed.experiment import estimate, runner

    logging.disable_progress_bar()  # the loading bars of transformers
    if config.dry_run:
        estimate.print_estimate(config.resolve(), Console())
        return
    stop = StopRequest()
    with stop.on_signal():
        summary = runner.study(config, say, stop)
    out = Console()
    out = out if out.is_terminal or "COLUMNS" in os.environ else Console(width=_FILE_WIDTH)
    for table in (terminal_table(summary), *protocol_tables(summary)):
        out.print(table)
    out.print(f"report: {Path(summary['run']['folder']) / 'report.html'}", markup=False, highlight=False, soft_wrap=True)


def parse(argv: list[str]) -> RunConfig:
    """The command line overrides --config FILE or the stored configuration of --resume, these override what a --protocol gives, and
    that overrides the defaults.

    Raises `BadConfig`, also for a --resume with another configuration.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", type=Path)
    first.add_argument("--resume", type=Path)
    for option in _LISTS:
        first.add_argument(option, nargs="*", action="extend")
    given, rest = first.parse_known_args(argv)
    values = read_yaml(given.config) if given.config else {}
    named = given.protocol if given.protocol is not None else values.get("protocol") or []
    named = [n for v in ([named] if isinstance(named, str) else named) for n in variants.names(str(v))]
    default = set_fields(RunConfig(), defaults_of(named) | values)
    default = stored_config(given.resume) if given.resume else default
    for option, value in vars(given).items():
        if isinstance(value, Path):
            rest += [f"--{option}", str(value)]
        elif value is not None:  # tyro takes each option once, and its values apart
            rest += [f"--{option}", *(value if option == "set" else filter(None, (n for v in value for n in variants.names(v))))]
    config = tyro.cli(RunConfig, args=rest, default=default, prog="testbed run", description=about())
    if given.resume and config.identity() != default.identity():
        changed = [k for k, v in config.identity().items() if v != default.identity()[k]]
        raise BadConfig(f"--resume goes on with the stored configuration; it cannot change {', '.join(changed)}")
    return config


_MANY = 100
"""Edits from which a worker's start, some ten seconds, is repaid."""
_FILE_WIDTH = 120
"""Characters in a line where the output is no terminal: the seven editors of the default run fit."""


def about() -> str:
    """What `--help` says above the options: their groups, and examples."""
    groups = (f"  {group}: {' '.join('--' + name.replace('_', '-') for name in names.split())}" for group, names in GROUPS.items())
    return "\n".join([RunConfig.__doc__ or "", "", "options by group:", *groups, "", _EXAMPLES])


GROUPS = {
    "edits and questions": "stream data_root missing_images edits protocol batch seed probe_budget benchmarks",
    "editors": "editor set plugin jobs",
    "model": "model prompt device device_map dtype max_new_tokens",
    "files": "out resume save_every save_model cache track config log",
    "look without a run": "list dry_run",
}
"""The fields of a run as `--help` lists them."""
_EXAMPLES = """examples:
  testbed run --stream okedit-yearly --edits 100
  testbed run --editor noop,memit,memit[history=true] --batch 10 --set memit.layers=1
  testbed run --model smollm2 --stream countries-yearly --editor noop,finetune --dry-run
  testbed run --stream jsonl:facts.jsonl --data-root FOLDER --set stream.fields=prompt=question,target=new
  testbed run --plugin my_editor.py --editor noop,my-edit
  testbed run --resume runs/FOLDER"""
_LISTS = ("--editor", "--benchmarks", "--plugin", "--protocol", "--set")
"""Options with several values: separated by commas, except --set, which may also be given several times."""


def read_yaml(path: Path, what: str = "") -> dict[str, Any]:
    """Fields of a run from a YAML file; `what` is its name in messages.

    Raises `BadConfig` for a file that is absent, broken or no mapping.
    """
    what = what or f"--config {path}"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as e:
        raise BadConfig(f"{what} cannot be read: {e}") from e
    if not isinstance(values, dict):
        raise BadConfig(f"{what} must hold fields and values, found {type(values).__name__}")
    known = {f.name for f in fields(RunConfig)}
    return {str(k).replace("-", "_") if str(k).replace("-", "_") in known else str(k): v for k, v in values.items()}


def list_plugins(console: Console) -> None:
    """Print every plug-in with one line each."""
    for registry in (EDITORS, WRAPPERS, STREAMS, PROBES, MONITORS, METRICS):
        table = Table(title=f"{registry.kind}s", title_justify="left", box=None, show_header=False, pad_edge=False)
        for name, cls in registry.items():
            more = f"\n{cls.time_axis} time; size: {cls.size}; licence: {cls.licence}" if registry is STREAMS else ""
            table.add_row(f"  {name}", cls.summary + more)
        console.print(table, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
