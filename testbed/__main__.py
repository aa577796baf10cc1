"""All commands under one name: `testbed run ...` and `python -m testbed run ...` are `python -m testbed.run ...`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from testbed.core import threads
from testbed.core.terminal import ended_by_its_reader

COMMANDS = {
    "run": ("testbed.run", "take editors through a stream of edits and write a report"),
    "ask": ("testbed.ask", "ask an edited model of a run a question"),
    "tune": ("testbed.tune", "choose an editor's settings for a model on development edits"),
    "sweep": ("testbed.sweep", "run a grid of editors, streams, models, seeds and settings"),
    "analyze": ("analysis.__main__", "make the report, figures and tables of run folders again"),
    "report": ("analysis.__main__", "another name of analyze"),
    "streams": ("streams.__main__", "show what a stream reads from files, and what it leaves out"),
    "bisect": ("testbed.bisect", "find the edit that broke a model"),
    "check": ("testbed.check", "run the shared contract suite on a plug-in of your own"),
    "bench": ("testbed.bench.__main__", "measure the speed and memory of editors"),
    "pretrain": ("testbed.pretrain", "train the tiny model on the simulated world or on a stream's old answers"),
    "lm-eval": ("testbed.integrations.lm_eval", "ask tasks of lm-evaluation-harness of the edited models of a run"),
}
"""By name the module whose `main` takes the arguments, and what the command does."""
GROUPS = {
    "edit models": ("run", "ask", "tune", "sweep", "bisect"),
    "read data and results": ("streams", "analyze", "report", "lm-eval"),
    "extend and measure": ("check", "bench", "pretrain"),
}
"""The commands as the overview shows them."""
_EXAMPLES = """examples:
  testbed run --stream okedit-yearly            the main job: editors, 500 edits, ten years, a report
  testbed run --list                            all editors, streams and probes
  testbed run --model smollm2 --stream countries-yearly --dry-run
  testbed check my_editor.py                    does my editor keep the contract?
  testbed ask runs/FOLDER "What is the capital of France?" --editor balancedit
"""


@ended_by_its_reader()
def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command; 0 for the list of commands and the version, 2 for an unknown command."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] in (["--version"], ["-V"]):
        print(f"lifelong-editing-testbed {installed_version()}")
        return 0
    if not args or args[0] in ("--help", "-h"):
        print(overview())
        return 0
    if args[0] not in COMMANDS:
        print(f"error: there is no command {args[0]!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if args[0] != "run":  # which knows the threads of a run that goes on
        threads.prepare()
    return importlib.import_module(COMMANDS[args[0]][0]).main(args[1:])


def overview() -> str:
    """The commands by group with a line each, and examples."""
    lines = ["usage: testbed COMMAND [options]; testbed COMMAND --help shows its options", ""]
    for group, names in GROUPS.items():
        lines += [f"{group}:", *(f"  {name:<10}{COMMANDS[name][1]}" for name in names), ""]
    return "\n".join([*lines, _EXAMPLES])


def installed_version() -> str:
    """The version of the installed distribution."""
    try:
        return version("lifelong-editing-testbed")
    except PackageNotFoundError:
        return "(not installed as a package)"


if __name__ == "__main__":
    sys.exit(main())
