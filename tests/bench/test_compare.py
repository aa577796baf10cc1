"""Two versions of the project measured in turn, each in processes of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.bench import __main__ as command
from testbed.bench import compare as module
from testbed.bench.common import BenchConfig
from testbed.bench.compare import VersionComparison, compare

ROOT = Path(__file__).parents[2]


def test_the_fewest_seconds_of_all_rounds_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def measure(tree: Path, model: str, config: BenchConfig) -> dict[str, float]:
        asked.append(("before" if tree == tmp_path else "after", model))
        slow = 3.0 if tree == tmp_path else 1.0
        return {e: slow * (5 - len(asked)) * (i + 1) for i, e in enumerate(config.editor)}

    monkeypatch.setattr(module, "_measure", measure)
    (rows,) = compare(BenchConfig(what=("compare",), before=tmp_path, rounds=2, editor=("noop", "finetune"), edits=7))
    assert asked == [("before", "tiny"), ("after", "tiny"), ("after", "tiny"), ("before", "tiny")]
    assert rows == [VersionComparison("tiny", "noop", 7, 3.0, 2.0), VersionComparison("tiny", "finetune", 7, 6.0, 4.0)]
    assert [row.ratio for row in rows] == [2 / 3, 2 / 3]


@pytest.mark.ci
def test_both_versions_are_measured_and_the_other_one_imports_itself(tmp_path: Path) -> None:
    """The other version is this one with an editor that burns CPU time."""
    for package in ("testbed", "streams", "analysis"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    noop = tmp_path / "testbed" / "editors" / "baselines" / "noop.py"
    noop.write_text(noop.read_text() + "\n\ndef _burn(self, batch, own=Noop.apply):\n    sum(range(10**7))\n    return own(self, batch)\n")
    noop.write_text(noop.read_text() + "\n\nNoop.apply = _burn\n")
    (rows,) = compare(BenchConfig(before=tmp_path, rounds=1, editor=("noop",), edits=3, device="cpu"))
    assert rows[0].edits == 3 and rows[0].before_seconds > 3 * rows[0].after_seconds > 0


def test_a_version_that_cannot_be_measured_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--what", "compare"]) == 2
    assert "--before" in capsys.readouterr().err
    (tmp_path / "testbed").mkdir()
    with pytest.raises(RuntimeError, match=r"measuring .* failed"):
        list(compare(BenchConfig(before=tmp_path, rounds=1, editor=("noop",), edits=1)))


def test_names_are_looked_up_by_file_and_not_by_import(tmp_path: Path) -> None:
    """An older layout is recognised although a newer version is installed: its names win where they have files."""
    for name, text in (("testbed/__init__.py", ""), ("testbed/registry.py", "WHICH = 'old'")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code = (
        f"import sys; sys.path[:0] = ['.', {str(ROOT / 'testbed' / 'bench')!r}]\n"
        "import json, compare_script\n"
        "print(json.dumps(compare_script.first_of('testbed.core.registry', 'testbed.registry').WHICH))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ))
    assert json.loads(done.stdout) == "old", done.stderr
