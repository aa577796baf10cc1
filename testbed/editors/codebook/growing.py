"""Tensors that grow by rows without being copied each time."""

from __future__ import annotations

from torch import Tensor

_GROWTH = 1.25


def appended(room: Tensor, at: int, new: Tensor) -> Tensor:
    """A buffer that holds `new` from row `at` on: the same one where it has the room, else a larger one with room to spare.

    Rows before `at` stay as they are, so that views of them never change.
    """
    if at + len(new) > len(room):
        larger = room.new_zeros(max(16, int(_GROWTH * at), at + len(new)), *room.shape[1:])
        larger[:at] = room[:at]
        room = larger
    room[at : at + len(new)] = new
    return room
