"""Hyper-parameters of a method by model: published values in a table in the method's own file, derived ones for other models.

A method has one dataclass, its configuration. A field that differs from model to model is None there until the user sets
it; `resolve` fills it in from the model's published row, or else from derived values, and last from the method's defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from testbed.model.handle import ModelHandle

C = TypeVar("C")
Values = Mapping[str, Any]
ModelKey = tuple[str, int]
"""Type of the language model as its configuration names it, and its number of decoder layers."""


def model_key(handle: ModelHandle) -> ModelKey:
    """The key under which a model's published row stands."""
    return handle.model.config.get_text_config().model_type, handle.n_layers


def resolve(
    config: C, handle: ModelHandle, table: Mapping[ModelKey, Values], derive: Callable[[ModelHandle], tuple[Values, str]], defaults: Values
) -> tuple[C, str]:
    """The configuration with its None fields filled in, and a note that says what was derived ("" for a published row).

    The note ends up on screen and in the run's manifest, so that no reader takes derived values for published ones.
    """
    key = model_key(handle)
    if key in table:
        return filled(config, {**defaults, **table[key]}), ""
    found, what = derive(handle)
    return filled(config, {**defaults, **found}), f"no published hyper-parameters for {key[0]} with {key[1]} layers: {what}"


def filled(config: C, values: Values) -> C:
    """A dataclass with these values in the place of fields that are None."""
    missing = [f.name for f in fields(config) if getattr(config, f.name) is None]  # type: ignore[arg-type]
    return replace(config, **{k: values[k] for k in missing if k in values})  # type: ignore[type-var]
