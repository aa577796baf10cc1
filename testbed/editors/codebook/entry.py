"""What a codebook knows of a row besides its key and radius."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One edit's row."""

    event_id: str
    label: tuple[int, ...]
    """The answer's tokens."""
    separable: bool = True
    positive: float = 0.0
    """Distance of the farthest positive anchor: the zone in which the entry must answer."""
    member_of: str | None = None
    """The older entry with the same label whose scope it fell into when it was inserted."""

    def json(self) -> list[Any]:
        """As JSON holds it."""
        return [list(x) if isinstance(x, tuple) else x for x in astuple(self)]

    @staticmethod
    def of(json: list[Any]) -> Entry:
        """The reverse of `json`."""
        event_id, label, *rest = json
        return Entry(event_id, tuple(label), *rest)
