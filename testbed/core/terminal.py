# pyright: strict
"""Output to any terminal or file."""

from __future__ import annotations

import io
import sys


def replace_what_the_terminal_lacks() -> None:
    """Print a replacement for a character that the encoding of an output lacks, because finished work must not end in an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
