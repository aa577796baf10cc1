"""Recognise that memory ran out, and do work in halves where the whole does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

T = TypeVar("T")
ADVICE = "use --dtype bfloat16, --device-map auto, or a smaller model"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU (where torch has no class of its own for it)."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError, OutOfMemory)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error) and "memory" in str(error)
    )


def free() -> None:
    """Give back what torch's allocator holds on to.

    Call it outside the `except` block: inside, the frames of the error still hold their tensors.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class OutOfMemory(RuntimeError):
    """Memory ran out for one row alone: nothing is left to halve."""


MEMORY_ERRORS = (OutOfMemory, torch.OutOfMemoryError)
"""Errors that a command line reports in one line, because nothing is left to halve."""


class MemoryLimit:
    """The most rows of one forward that memory holds, as far as that was found out.

    notes: messages not yet shown, one for each time that the limit turned out to be lower.
    """

    def __init__(self) -> None:
        self.rows: int | None = None
        self.notes: list[str] = []

    def limit(self, rows: int) -> int:
        """That many rows, or as many as memory holds."""
        return rows if self.rows is None else min(rows, self.rows)

    def fitting(self, chunks: Iterable[list[int]], work: Callable[[list[int]], T]) -> Iterator[tuple[list[int], T]]:
        """Each chunk with the result of `work` on it; of a chunk that memory does not hold, its halves, and so on.

        Raises `OutOfMemory` where a single row is too much.
        """
        for chunk in chunks:
            todo = [chunk]
            while todo:
                part = todo.pop()
                found = self._attempt(part, work) if len(part) <= self.limit(len(part)) else None
                if found is not None:
                    yield part, found
                else:
                    half = len(part) // 2
                    todo += [part[half:], part[:half]]

    def _attempt(self, part: list[int], work: Callable[[list[int]], T]) -> T | None:
        """The result of `work`, which is never None; None where memory ran out."""
        try:
            return work(part)
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
            if len(part) == 1:
                raise OutOfMemory(f"memory runs out for a single prompt ({type(e).__name__}): {ADVICE}") from e
        self.rows = len(part) // 2
        self.notes.append(f"memory ran out with {len(part)} prompts in one forward: from there on at most {self.rows}")
        free()
        return None
