"""Tensors that grow by rows without being copied each time."""

from __future__ import annotations

from torch import Tensor

_GROWTH = 1.25
"""How many times its rows a new buffer holds."""


def appended(buffer: Tensor, at: int, new: Tensor) -> Tensor:
    """A buffer that holds `new` from row `at` on: the same one where it is long enough, else a larger one with rows to spare.

    Rows before `at` stay as they are, so that views of them never change.
    """
    if at + len(new) > len(buffer):
        larger = buffer.new_zeros(max(16, int(_GROWTH * at), at + len(new)), *buffer.shape[1:])
        larger[:at] = buffer[:at]
        buffer = larger
    buffer[at : at + len(new)] = new
    return buffer
