"""Ranges of configuration values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.core.ranges import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Range, out_of_range


@dataclass(frozen=True)
class Settings:
    lr: PositiveFloat = 0.1
    steps: PositiveInt = 1
    weight: Fraction | None = None
    layers: tuple[NonNegativeInt, ...] | None = None
    temperature: Annotated[float, Range(above=-1)] = 0.0
    name: str = "x"
    flag: bool = False


@dataclass(frozen=True)
class MoreSettings(Settings):
    rank: NonNegativeInt = 0


def test_values_within_their_ranges_and_unset_ones_pass() -> None:
    assert out_of_range(Settings()) == []
    assert out_of_range(Settings(weight=1.0, layers=(0, 3))) == []


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"weight": 1.5}, "weight must be between 0 and 1, got 1.5"),
        ({"layers": (2, -1)}, "layers must be 0 or more, got 2, -1"),
        ({"temperature": -1.0}, "temperature must be more than -1, got -1.0"),
    ],
)
def test_a_value_outside_its_range_is_named(changed: dict, sentence: str) -> None:
    assert out_of_range(MoreSettings(**changed)) == [sentence]


@given(x=st.floats(allow_nan=True), low=st.floats(-5, 5), width=st.floats(0, 5))
def test_a_range_holds_what_lies_between_its_bounds(x: float, low: float, width: float) -> None:
    assert Range(least=low, most=low + width).holds(x) == (low <= x <= low + width)
