# pyright: strict
"""Ranges of configuration values: the annotation of a field states them, and one function checks them.

    lr: PositiveFloat = 5e-3
    layers: tuple[NonNegativeInt, ...] | None = None

A field whose value is None is unset and is not checked; a tuple is checked item by item.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """Bounds of a number: `least <= x`, `above < x`, `x <= most`."""

    least: float | None = None
    above: float | None = None
    most: float | None = None

    def holds(self, x: float) -> bool:
        """True for a number within the bounds; NaN lies in no range."""
        low = (self.least is None or x >= self.least) and (self.above is None or x > self.above)
        return x == x and low and (self.most is None or x <= self.most)

    def __str__(self) -> str:
        low = "" if self.least is None else f"{self.least:g} or more"
        low = low or ("" if self.above is None else "positive" if self.above == 0 else f"more than {self.above:g}")
        if self.least is not None and self.most is not None:
            return f"between {self.least:.12g} and {self.most:.12g}"
        return " and ".join(filter(None, (low, "" if self.most is None else f"at most {self.most:g}")))


PositiveInt = Annotated[int, Range(least=1)]
NonNegativeInt = Annotated[int, Range(least=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(least=0)]
Fraction = Annotated[float, Range(least=0, most=1)]
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]
"""Seeds that numpy, torch and the hashes of panels all take."""
PositiveFraction = Annotated[float, Range(above=0, most=1)]


def out_of_range(config: Any) -> list[str]:
    """One sentence for each field of a dataclass whose value lies outside the range of its annotation."""
    hints = typing.get_type_hints(config.__class__, include_extras=True)
    return [
        f"{field.name} must be {bound}, got {', '.join(map(str, _items(value)))}"
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
        for bound in _ranges(hints[field.name])
        if not all(bound.holds(x) for x in _items(value) if isinstance(x, (int, float)) and not isinstance(x, bool))
    ]


def _ranges(hint: Any) -> list[Range]:
    """The ranges inside a type, at any depth of unions and tuples."""
    own = [m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Range)]
    inner = typing.get_args(hint)[:1] if hasattr(hint, "__metadata__") else typing.get_args(hint)
    return own + [r for a in inner for r in _ranges(a)]


def _items(value: Any) -> list[Any]:
    return [*typing.cast("Iterable[Any]", value)] if isinstance(value, (tuple, list)) else [value]
