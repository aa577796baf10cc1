"""The walk of docs/add-an-editor.md works: its commands, run in a copy of the project, make, run and test the template's editor."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "add-an-editor.md").read_text("utf-8")
COMMANDS = re.findall(r"```bash\n(.*?)\n```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which a new file does no harm; the tiny model is linked."""
    copy = tmp_path_factory.mktemp("project")
    for name in ("streams", "analysis", "testbed", "tests", "docs/templates"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    (copy / "testbed" / "assets").symlink_to(ROOT / "testbed" / "assets")
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def run(command: str, where: Path) -> str:
    """Runs one command of the page; python is the one that runs the tests."""
    words = [sys.executable if w == "python" else w for w in shlex.split(command)]
    environment = {**os.environ, "PYTHONPATH": str(where), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=where, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_page_has_the_three_commands_of_the_walk() -> None:
    assert [c.split()[0] for c in COMMANDS] == ["cp", "python", "python"]


@pytest.mark.ci
def test_the_walk_makes_runs_plots_and_tests_an_editor(project: Path) -> None:
    copy, study, suite = COMMANDS
    run(copy, project)
    assert "--edits 20 " in study
    shown = run(study.replace("--edits 20 ", "--edits 6 "), project)
    assert "sgd-edit" in shown
    out = project / "runs" / "sgd"
    summary = json.loads((out / "summary.json").read_text("utf-8"))["editors"]
    assert summary["sgd-edit"]["edit_success_now"]["value"] > summary["noop"]["edit_success_now"]["value"] + 0.3
    assert (out / "report.html").stat().st_size > 10_000
    assert list((out / "figures").glob("*.png"))
    assert re.search(r"(?m)^[1-9]\d* passed", run(suite + " -p no:cacheprovider", project).splitlines()[-1])


def test_every_function_that_the_page_names_exists() -> None:
    source = "\n".join(p.read_text("utf-8") for p in (ROOT / "testbed").rglob("*.py"))
    named = set(re.findall(r"`([a-z_]+)\(", PAGE)) | set(re.findall(r"`[a-z_]+\.([A-Z]\w+)", PAGE))
    assert len(named) > 8
    assert [n for n in sorted(named) if not re.search(rf"(def|class) {n}\b", source)] == []
    files = re.findall(r"`((?:testbed|tests|docs)/[\w/.-]+)`", PAGE)
    assert [f for f in files if not (ROOT / f).exists() and "sgd" not in f] == []
