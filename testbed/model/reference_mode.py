"""The plain path: the same method with the whole model at every step and nothing kept, to measure and check the fast one against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

_WHOLE: ContextVar[bool] = ContextVar("whole", default=False)
_SEEN: ContextVar[list[Tensor] | None] = ContextVar("seen", default=None)


@contextmanager
def plain() -> Iterator[None]:
    """Inside, `tail.capture` and `tail.enter` give objects that run the whole model, from pixels to logits, at every call."""
    token = _WHOLE.set(True)
    try:
        yield
    finally:
        _WHOLE.reset(token)


@contextmanager
def watched() -> Iterator[list[Tensor]]:
    """Inside, the losses (B,) of every training step are kept, in order: what two paths are compared by."""
    seen: list[Tensor] = []
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


def watch(losses: Tensor) -> Tensor:
    """The same losses, shown to `watched()`."""
    seen = _SEEN.get()
    if seen is not None:
        seen.append(losses.detach())
    return losses


def inside_plain() -> bool:
    """True inside `plain()`."""
    return _WHOLE.get()
