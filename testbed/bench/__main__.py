"""`python -m testbed.bench`: speed and memory of editors. Timings live here and never in tests.

`--what` chooses the tables. `editors`: a fresh editor on a model makes edits, one at a time or `--batch` at once, and the
edited model answers questions; edits a second beside the reference implementation, seconds by stage, bytes of state, peak
memory. `paths`: each method beside its reference implementation (one edit at a time, whole model, no cache), with the largest
difference of a training loss. `flops`: FLOPs of matrix products of an edit and of a question, and their share of the machine's peak
rate; it wants an otherwise idle machine. `questions`: a plain loop over `model.generate` beside the unedited and the edited
model. `late`: the same next edits and questions by an editor early in a run and at its end. `codebook`: insertion, retrieval and
bytes by number of entries. `compare`: this version beside another one, `--before DIR`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is loaded
    from testbed.core import threads

    threads.prepare()

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console

from testbed.bench import codebook, editors, late, questions
from testbed.bench.common import BenchConfig, Rows, as_json, each_editor, machine, table
from testbed.bench.compare import compare
from testbed.core import variants
from testbed.core.plugins import load_plugins
from testbed.core.terminal import ended_by_its_reader
from testbed.experiment.command import run_command
from testbed.storage.files import replacing

TABLES: dict[str, Callable[[BenchConfig], Rows]] = {
    "editors": partial(each_editor, lambda *measured: [editors.measure_editor(*measured)]),
    "paths": partial(each_editor, lambda *measured: [editors.measure_paths(*measured)]),
    "flops": partial(each_editor, editors.measure_flops),
    "questions": partial(each_editor, questions.measure_questions),
    "late": late.late_rows,
    "codebook": codebook.codebook_rows,
    "compare": compare,
}
_FILE_WIDTH = 200
"""Characters in a line where the output is no terminal."""


@ended_by_its_reader()
def main(argv: list[str] | None = None) -> int:
    """Command line; 0, or 2 for a mistake of the user."""
    import tyro
    from transformers.utils import logging

    logging.disable_progress_bar()
    args = [part for a in (sys.argv[1:] if argv is None else argv) for part in variants.names(a)]
    config = tyro.cli(BenchConfig, args=args, prog="python -m testbed.bench")
    if problems := config.problems(TABLES):
        print("\n".join(problems), file=sys.stderr)
        return 2
    if config.threads:
        torch.set_num_threads(config.threads)
    console = Console()
    console = console if console.is_terminal else Console(width=_FILE_WIDTH)
    measured: dict[str, list[Any]] = {}
    code, _ = run_command(lambda: _measure(measured, config), "the same command, which starts again")
    for rows in measured.values():
        for kind in dict.fromkeys(map(type, rows)):
            console.print(table([row for row in rows if type(row) is kind]))
    return code


def _measure(measured: dict[str, list[Any]], config: BenchConfig) -> None:
    """Load the plug-ins and fill `measured` with rows by table. Each row is written to the file at once: an interrupt loses nothing."""
    load_plugins(config.plugin)
    for name in config.what:
        for rows in TABLES[name](config):
            measured.setdefault(name, []).extend(rows)
            if config.out:
                with replacing(config.out) as temporary:
                    plain = {what: [as_json(row) for row in of_table] for what, of_table in measured.items()}
                    temporary.write_text(json.dumps({"machine": machine(), **plain}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
