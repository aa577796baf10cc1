"""Plug-ins from outside the package: run, resumed, asked, and refused where they changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.core.plugins import BadPlugin, load_plugins
from testbed.core.registry import EDITORS

ROOT = Path(__file__).parents[2]
TEMPLATE = (ROOT / "docs" / "templates" / "editor.py").read_text("utf-8")
SMALL = ["--stream", "world-yearly", "--edits", "4", "--batch", "2", "--probe-budget", "100"]


def command(where: Path, module: str, *args: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", module, *args], cwd=where, env=environment, capture_output=True, text=True, timeout=300)


def test_an_editor_of_ones_own_file_runs_resumes_and_answers(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(TEMPLATE.replace('"sgd-edit"', '"my-edit"'))
    done = command(tmp_path, "testbed.run", *SMALL, "--plugin", "mine.py", "--editor", "noop,my-edit", "--out", "out")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert f"plugin mine.py: SHA-256 {manifest['plugins'][0][:12]}..." in manifest["notes"]
    assert manifest["config"]["plugin"] == ["mine.py"] and len(manifest["plugins"][0]) == 64
    assert "my-edit" in json.loads((tmp_path / "out" / "summary.json").read_text())["editors"]
    again = command(tmp_path, "testbed.run", "--resume", "out")
    assert again.returncode == 0, again.stderr
    asked = command(tmp_path, "testbed.ask", "out", "What is 2 plus 3?", "--editor", "my-edit")
    assert asked.returncode == 0 and "my-edit" in asked.stdout, asked.stderr
    mine.write_text(mine.read_text() + "\nfrom pathlib import Path\nPath('ran').touch()\n")
    refused = command(tmp_path, "testbed.run", "--resume", "out")
    assert refused.returncode == 2 and "changed since the run began" in refused.stderr and "Traceback" not in refused.stderr
    assert not (tmp_path / "ran").exists()  # nothing of a changed file is run
    mine.rename(tmp_path / "moved.py")
    gone = command(tmp_path, "testbed.run", "--resume", "out")
    assert gone.returncode == 2 and "there is no such file" in gone.stderr


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    broken, empty = tmp_path / "broken.py", tmp_path / "empty.py"
    broken.write_text("import nowhere_at_all\n")
    empty.write_text("x = 1\n")
    with pytest.raises(BadPlugin, match=r"broken\.py cannot be loaded: ModuleNotFoundError"):
        load_plugins([str(broken)])
    with pytest.raises(BadPlugin, match="registers nothing"):
        load_plugins([str(empty)])
    with pytest.raises(BadPlugin, match="there is no such file"):
        load_plugins([str(tmp_path / "absent.py")])
    with pytest.raises(BadPlugin, match="a file is given by its path"):
        load_plugins(["no.such.module"])


def test_a_name_that_is_taken_and_a_file_that_changed_are_refused(tmp_path: Path) -> None:
    taken, mine = tmp_path / "taken.py", tmp_path / "mine.py"
    taken.write_text(TEMPLATE.replace('"sgd-edit"', '"noop"'))
    with pytest.raises(BadPlugin, match=r"registered by .* and again by"):
        load_plugins([str(taken)])
    mine.write_text(TEMPLATE.replace('"sgd-edit"', '"edit-of-a-test"'))
    try:
        assert load_plugins([str(mine)]) == load_plugins([str(mine)])
        mine.write_text(mine.read_text() + "\n")
        with pytest.raises(BadPlugin, match="changed since this process loaded it"):
            load_plugins([str(mine)])
    finally:
        EDITORS._entries.pop("edit-of-a-test")
