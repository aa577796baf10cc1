"""How many token positions a forward of the decoder runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from testbed.model.handle import ModelHandle


@contextmanager
def places(handle: ModelHandle, layer: int = 0) -> Iterator[list[int]]:
    """How many places (rows times columns) each forward of a decoder layer runs."""
    seen: list[int] = []

    def note(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append(hidden.shape[0] * hidden.shape[1])

    hook = handle.layers[layer].register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()
