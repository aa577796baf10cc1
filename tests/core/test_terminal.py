"""Output to terminals that lack characters."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize("command", [["testbed.run", "--list"], ["analysis", "東京"], ["streams", "東京"]])
def test_a_character_that_the_encoding_lacks_is_replaced(command: list[str], encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True)
    assert b"Traceback" not in done.stderr and done.returncode == (0 if "--list" in command else 2)
    assert done.stdout or done.stderr
