# pyright: strict
"""Output to any terminal, file or pipe."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Generator
from contextlib import contextmanager

READER_GONE = 141
"""Exit code of a command whose reader closed the pipe: 128 and the number of SIGPIPE, as in a shell."""


def replace_what_the_terminal_lacks() -> None:
    """Print a replacement for a character that the encoding of an output lacks, because finished work must not end in an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


@contextmanager
def ended_by_its_reader() -> Generator[None]:
    """End the command with exit code 141 and without a traceback where the reader of its output has closed the pipe (`| head`).

    Also a decorator. Raises SystemExit (rich raises it itself, with exit code 1, for what it prints). What the output still holds
    is written first, because the interpreter would otherwise find the closed pipe at its end. A broken pipe to anything but a
    reader of the output is an error and is raised.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        gone = [fd for fd in map(_descriptor, (sys.stdout, sys.stderr)) if fd is not None and _reader_is_gone(fd)]
        if not gone:
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for fd in gone:  # where the interpreter flushes to at its end
            os.dup2(nowhere, fd)
        raise SystemExit(READER_GONE) from None


def _descriptor(stream: object) -> int | None:
    """The file descriptor of a stream; None where it has none, as in a notebook."""
    try:
        return stream.fileno() if isinstance(stream, io.IOBase) else None
    except OSError:
        return None


def _reader_is_gone(fd: int) -> bool:
    """Whether a descriptor is a pipe that nobody reads any more."""
    asked = select.poll()
    asked.register(fd, 0)  # an error is reported whatever is asked for
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in asked.poll(0))
