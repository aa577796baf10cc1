"""Output to terminals that lack characters, and to pipes whose reader has gone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from testbed.core.terminal import READER_GONE


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize("command", [["testbed.run", "--list"], ["analysis", "東京"], ["streams", "東京"]])
def test_a_character_that_the_encoding_lacks_is_replaced(command: list[str], encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True)
    assert b"Traceback" not in done.stderr and done.returncode == (0 if "--list" in command else 2)
    assert done.stdout or done.stderr


def write_to_a_closed_pipe(*command: str) -> tuple[int, bytes]:
    """Exit code and error output of a command whose reader has gone before it writes."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, *command], stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize("command", [("run", "--help"), ("--help",)], ids=" ".join)
def test_a_command_ends_quietly_when_its_reader_closes_the_pipe(command: tuple[str, ...]) -> None:
    assert write_to_a_closed_pipe("-m", "testbed", *command) == (READER_GONE, b"")


WITHIN = "import os, sys\nfrom testbed.core.terminal import ended_by_its_reader\nwith ended_by_its_reader():\n    "


def test_output_that_is_still_held_back_ends_the_command_too() -> None:
    assert write_to_a_closed_pipe("-c", f"{WITHIN}sys.stdout.write('a')") == (READER_GONE, b"")
    assert write_to_a_closed_pipe("-c", f"{WITHIN}sys.stdout.write('a' * 10**6)") == (READER_GONE, b"")


def test_what_rich_prints_ends_quietly_with_the_exit_code_of_rich() -> None:
    assert write_to_a_closed_pipe("-c", f"{WITHIN}from rich.console import Console; Console().print('a')") == (1, b"")


def test_a_broken_pipe_to_anything_else_is_an_error() -> None:
    done = subprocess.run([sys.executable, "-c", f"{WITHIN}raise BrokenPipeError('a socket')"], capture_output=True)
    assert done.returncode == 1 and b"BrokenPipeError: a socket" in done.stderr
