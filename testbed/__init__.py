"""The lifelong-editing testbed: streams of dated fact changes, sequential editors, and measurements of the edited model.

`study`, `RunConfig` and `FinishedRun` are imported at their first use, so `import testbed` loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from testbed.api.finished_run import FinishedRun, study
    from testbed.experiment.config import RunConfig

__all__ = ["FinishedRun", "RunConfig", "study"]
for _name in ("streams", "analysis"):  # `python -m` looks into the current folder first, where a user may have such folders
    _spec, _own = find_spec(_name), Path(__file__).parents[1] / _name
    if _spec is None or _spec.origin is None or Path(_spec.origin).parent != _own:
        _found = _spec.origin if _spec else "nothing"
        raise ImportError(
            f"the package {_name} of the testbed lies in {_own}, but Python finds {_found} under that name, because it "
            "looks into the current folder first: use the command `testbed`, or start Python in another folder"
        )
_MODULES = {
    "FinishedRun": "testbed.api.finished_run",
    "RunConfig": "testbed.experiment.config",
    "study": "testbed.api.finished_run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'testbed' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
