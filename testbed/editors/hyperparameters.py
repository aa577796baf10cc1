"""Hyper-parameters of a method by model: published values in a table in the method's own file, derived ones for other models.

A method keeps a frozen dataclass of its hyper-parameters and a table of published rows, and its configuration has a field
of the same name (None by default) for each value that a user may set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

from testbed.model.handle import ModelHandle

H = TypeVar("H")
ModelKey = tuple[str, int]
"""Type of the language model as its configuration names it, and its number of decoder layers."""


def model_key(handle: ModelHandle) -> ModelKey:
    """The key under which a model's published row stands."""
    return handle.model.config.get_text_config().model_type, handle.n_layers


def hyperparameters_for(handle: ModelHandle, table: Mapping[ModelKey, H], derive: Callable[[ModelHandle], tuple[H, str]]) -> tuple[H, str]:
    """The published row for this model and an empty note, or derived values and a note that says what was derived.

    The note ends up on screen and in the run's manifest, so that no reader takes derived values for published ones.
    """
    key = model_key(handle)
    if key in table:
        return table[key], ""
    found, what = derive(handle)
    return found, f"no published hyper-parameters for {key[0]} with {key[1]} layers: {what}"


def overlay(hyperparameters: H, config: Any) -> H:
    """The hyper-parameters with every field that the configuration sets (not None) in its place."""
    own = {f.name: getattr(config, f.name, None) for f in fields(hyperparameters)}  # type: ignore[arg-type]
    return replace(hyperparameters, **{k: v for k, v in own.items() if v is not None})  # type: ignore[type-var]
