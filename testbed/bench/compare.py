"""This version of the project beside another one (table `compare`): the same edits in fresh processes, in turn."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from testbed.bench.common import BenchConfig, Rows

_HERE = Path(__file__).parents[2]
_SCRIPT = Path(__file__).with_name("compare_script.py")


@dataclass(frozen=True)
class VersionComparison:
    """CPU seconds of the edits after the first five batches (which check layouts and more), the fewest of all rounds."""

    model: str
    editor: str
    edits: int
    before_seconds: float
    after_seconds: float

    @property
    def ratio(self) -> float:
        """After over before: below 1 this version is faster."""
        return self.after_seconds / self.before_seconds


def compare(config: BenchConfig) -> Rows:
    """Every editor on every model; the two versions take turns in going first.

    Raises RuntimeError with the output of a process that fails.
    """
    before = config.before or _HERE
    for model in config.model:
        seconds: dict[tuple[Path, str], list[float]] = defaultdict(list)
        for n in range(config.rounds):
            for tree in (before, _HERE) if n % 2 == 0 else (_HERE, before):
                for editor, spent in _measure(tree, model, config).items():
                    seconds[tree, editor].append(spent)
        yield [VersionComparison(model, e, config.edits, min(seconds[before, e]), min(seconds[_HERE, e])) for e in config.editor]


def _measure(tree: Path, model: str, config: BenchConfig) -> dict[str, float]:
    """CPU seconds by editor, measured in a process that imports the project from `tree`."""
    options = {
        name: getattr(config, name) for name in ("device", "dtype", "stream", "text_stream", "seed", "edits", "batch", "threads", "set")
    }
    command = [sys.executable, str(_SCRIPT), json.dumps({"model": model, "editors": config.editor, **options})]
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve())}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring {tree} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
