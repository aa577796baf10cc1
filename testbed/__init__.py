"""The lifelong-editing testbed: streams of dated fact changes, sequential editors, and measurements of the edited model.

`study` and `RunConfig` are imported at their first use, so `import testbed` loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from testbed.experiment.config import RunConfig
    from testbed.experiment.runner import study

__all__ = ["RunConfig", "study"]


def __getattr__(name: str) -> Any:
    if name == "study":
        from testbed.experiment.runner import study

        return study
    if name == "RunConfig":
        from testbed.experiment.config import RunConfig

        return RunConfig
    raise AttributeError(f"module 'testbed' has no attribute {name!r}")
