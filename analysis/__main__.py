"""python -m analysis OUT [OUT ...]: write summary, figures, tables and report again from stored answers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from analysis.figures.catalogue import FORMATS
from analysis.metrics.bootstrap import REPLICATES
from analysis.reading.records import BadRun
from analysis.reporting.report import COMPARISON, TABLES, write_all
from analysis.reporting.tables import protocol_tables, terminal_table
from testbed.core.plugins import BadPlugin, load_plugins
from testbed.core.terminal import ended_by_its_reader, replace_what_the_terminal_lacks


@ended_by_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0 when everything was written, 2 when a run cannot be analysed or the folder not be written."""
    replace_what_the_terminal_lacks()
    given = parser().parse_args(argv)
    to = given.out or (given.runs[0] if len(given.runs) == 1 else given.runs[0] / COMPARISON)
    try:
        load_plugins(_list(given.plugin))
        summary = write_all(given.runs, _list(given.format), _list(given.tables), to, given.seed, given.replicates, given.columns)
    except (BadRun, BadPlugin) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{to} cannot be written: {error}. The stored answers are as they were; name another folder with --out", file=sys.stderr)
        return 2
    console = Console()
    for table in (terminal_table(summary), *protocol_tables(summary)):
        console.print(table)
    for note in summary["run"]["notes"]:
        console.print(f"note: {note}", markup=False, highlight=False)
    if unused := sorted({p for r in given.runs for p in named_plugins(r)} - set(_list(given.plugin))):
        print(f"the run had the plug-ins {', '.join(unused)}: for metrics that they register, give them with --plugin", file=sys.stderr)
    console.print(f"report: {to / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m analysis", description=__doc__)
    p.add_argument(
        "runs", nargs="+", type=Path, metavar="OUT", help="run folder; several must share their schedule, or differ in their seed alone"
    )
    p.add_argument("--plugin", default="", help="Python files or modules with metrics of your own, separated by commas")
    p.add_argument("--format", default="png,pdf", help=f"figure formats, of {', '.join(FORMATS)} (default: png,pdf)")
    p.add_argument("--tables", default="csv,latex", help=f"kinds of tables, of {', '.join(TABLES)} (default: both)")
    p.add_argument("--columns", type=int, choices=(1, 2), default=2, help="width of figures, in columns of a journal's page (default: 2)")
    p.add_argument("--out", type=Path, help=f"where to write (default: the run itself, or OUT/{COMPARISON} for several)")
    p.add_argument("--seed", type=int, default=0, help="seed of the bootstrap (default: 0)")
    p.add_argument("--replicates", type=int, default=REPLICATES, help=f"bootstrap replicates (default: {REPLICATES})")
    return p


def named_plugins(run: Path) -> list[str]:
    """The plug-ins that a run was given. They are not loaded, because reading a folder of somebody else's must run no code."""
    return list(json.loads((run / "manifest.json").read_text("utf-8")).get("config", {}).get("plugin", ()))


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


if __name__ == "__main__":
    sys.exit(main())
