"""The README's two lines say what .ci/run and a stranger will do; the command in them runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINES = [x for x in (ROOT / "README.md").read_text().splitlines() if ".venv/bin/" in x]


def test_there_are_two_lines_of_setup() -> None:
    assert len(LINES) == 2
    assert LINES[0].startswith("python3 -m venv .venv && .venv/bin/pip install")
    assert LINES[1].startswith(".venv/bin/pip install")
    assert "python -m pytest" in LINES[1]


def test_every_file_that_the_readme_names_exists() -> None:
    named = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert named
    assert [n for n in named if not (ROOT / n).exists()] == []


def test_the_main_job_runs(tmp_path: Path) -> None:
    command = LINES[0].split(" && ")[-1].replace(".venv/bin/python", sys.executable)
    small = ["--edits", "6", "--out", str(tmp_path / "run"), "--probe-budget", "200"]
    done = subprocess.run([*shlex.split(command), *small], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "report.html").stat().st_size > 10_000
