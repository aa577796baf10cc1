"""One command for all: what it lists, what it hands on, and folders of the user that stand in the way."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from testbed import __main__ as command
from testbed import run
from testbed.experiment.config import RunConfig

ROOT = Path(__file__).parents[2]


def test_every_command_is_listed_and_exists(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 0
    shown = capsys.readouterr().out
    for name, (module, about) in command.COMMANDS.items():
        assert f"  {name:<10}{about}" in shown
        assert callable(importlib.import_module(module).main)
    assert sorted(n for names in command.GROUPS.values() for n in names) == sorted(command.COMMANDS)
    assert "examples:\n  testbed run " in shown
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("lifelong-editing-testbed ")


def test_the_help_of_a_run_has_every_option_in_one_group_and_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert sorted(" ".join(run.GROUPS.values()).split()) == sorted(f.name for f in fields(RunConfig))
    with pytest.raises(SystemExit):
        command.main(["run", "--help"])
    shown = capsys.readouterr().out
    assert "usage: testbed run" in shown and "options by group:" in shown and "  editors: --editor --set --plugin" in shown
    for words in re.findall(r"^  testbed (run .*)$", run.about(), re.MULTILINE):
        if "--resume" not in words:
            assert run.parse(words.split()[1:])


def test_arguments_are_handed_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", "--list"]) == 0
    assert "balancedit" in capsys.readouterr().out
    assert command.main(["bench", "--edits", "0"]) == 2
    assert "--edits must be 1 or more" in capsys.readouterr().err
    assert command.main(["fly"]) == 2
    assert "there is no command 'fly'; there are run, ask" in capsys.readouterr().err


def test_a_folder_of_the_user_that_stands_in_the_way_is_named_and_the_command_does_not_see_it(tmp_path: Path) -> None:
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "testbed", "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode and f"Python finds {tmp_path / 'analysis' / '__init__.py'}" in done.stderr
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / "testbed"  # as pip writes it for an entry point
    script.write_text("import sys\nfrom testbed.__main__ import main\nsys.exit(main())\n")
    done = subprocess.run([sys.executable, str(script), "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
