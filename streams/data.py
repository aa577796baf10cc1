"""Read the tables that lie beside the modules of this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def table(module: str, name: str) -> Any:
    """The YAML file `name` beside a module (its `__file__`); lists become tuples."""
    return _frozen(yaml.safe_load(Path(module).with_name(name).read_text(encoding="utf-8")))


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _frozen(v) for k, v in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
