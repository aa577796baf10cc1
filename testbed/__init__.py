"""The lifelong-editing testbed: streams of dated fact changes, sequential editors, and measurements of the edited model.

`study` and `RunConfig` are imported at their first use, so `import testbed` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from testbed.experiment.config import RunConfig
    from testbed.experiment.runner import study

__all__ = ["RunConfig", "study"]
_MODULES = {"RunConfig": "testbed.experiment.config", "study": "testbed.experiment.runner"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'testbed' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
