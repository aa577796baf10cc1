"""Import arrows and quiet imports: who may know whom, and what an import must not do."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from testbed.registry import EDITORS, STREAMS

ROOT = Path(__file__).parent.parent
PACKAGES = ("testbed", "streams", "analysis")
FILES = sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))
NAMERS = {"testbed/run.py", "testbed/sweep.py", "testbed/bench.py", "testbed/config.py"}
"""Files that may name plug-ins: command lines, and the defaults of a run."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, type-checking blocks left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)} imports relatively"
            yield from (f"{node.module}.{a.name}" for a in node.names)


def top(modules: Iterator[str]) -> set[str]:
    return {m.split(".")[0] for m in modules}


def inside(module: str, *allowed: str) -> bool:
    return any(module == a or module.startswith(a + ".") for a in allowed)


def test_the_scan_sees_the_project() -> None:
    assert {"testbed/loop.py", "streams/base.py", "analysis/load.py"} <= {name_of(p) for p in FILES}


@pytest.mark.parametrize("name", ["events", "schema", "registry", "grading"])
def test_the_shared_core_needs_the_standard_library_and_numpy_alone(name: str) -> None:
    foreign = top(imports(ROOT / "testbed" / f"{name}.py")) - sys.stdlib_module_names - {"numpy", "__future__"}
    assert not foreign


def test_grading_needs_the_standard_library_alone() -> None:
    assert top(imports(ROOT / "testbed" / "grading.py")) <= sys.stdlib_module_names | {"__future__"}


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "streams"], ids=name_of)
def test_streams_know_events_schema_and_registry_alone(path: Path) -> None:
    known = [m for m in imports(path) if m.split(".")[0] in ("testbed", "analysis")]
    assert [m for m in known if not inside(m, "testbed.events", "testbed.schema", "testbed.registry")] == []
    assert not top(imports(path)) & {"torch", "transformers"}


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "analysis"], ids=name_of)
def test_analysis_knows_schema_and_grading_alone(path: Path) -> None:
    found = list(imports(path))
    assert [m for m in found if inside(m, "testbed") and not inside(m, "testbed.schema", "testbed.grading")] == []
    assert not top(iter(found)) & {"torch", "transformers", "streams", "ray", "avalanche"}


def test_avalanche_lives_in_its_bridge_alone() -> None:
    users = [name_of(p) for p in FILES if "avalanche" in top(imports(p))]
    assert users
    assert all(u.startswith("testbed/bridges/") for u in users)


def test_the_harness_lives_in_its_bridge_alone() -> None:
    assert [name_of(p) for p in FILES if "lm_eval" in top(imports(p))] == ["testbed/bridges/lm_eval.py"]


def test_the_loop_and_the_probes_know_no_plug_in() -> None:
    for path in [ROOT / "testbed" / f"{n}.py" for n in ("loop", "schedule", "store", "predictor", "models", "encode", "runner")]:
        known = [m for m in imports(path) if inside(m, "testbed.editors", "testbed.probes", "testbed.monitors", "streams")]
        contracts = ("testbed.editors.base", "testbed.probes.base", "testbed.monitors.base", "streams.base", "streams.arrange")
        assert [m for m in known if not inside(m, *contracts)] == [], path.name


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p) not in NAMERS], ids=name_of)
def test_nobody_names_an_editor_or_a_stream(path: Path) -> None:
    """Outside its own registration and a class's `name`, no string is the name of an editor or a stream."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {id(c) for node in ast.walk(tree) if _gives_a_name(node) for c in ast.walk(node)}
    strings = [c for c in ast.walk(tree) if isinstance(c, ast.Constant) and id(c) not in own]
    assert [c.value for c in strings if c.value in {*EDITORS.names(), *STREAMS.names()}] == []


def _gives_a_name(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr == "register"
    return isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["name"]


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p) not in NAMERS], ids=name_of)
def test_nobody_asks_which_plug_in_it_is(path: Path) -> None:
    """No comparison with an attribute `name` of an editor, stream or probe."""
    compared = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Compare)]
    asked = [ast.unparse(c) for c in compared for side in (c.left, *c.comparators) if _NAME.fullmatch(ast.unparse(side))]
    assert asked == []


_NAME = re.compile(r"(.*\.)?(editor|stream|probe)\.name")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_star_imports_and_no_printing_outside_command_lines(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for n in ast.walk(tree))
    prints = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print"]
    assert not prints or "argv" in path.read_text(encoding="utf-8"), f"{name_of(path)} prints and is no command line"


QUIET = """
import json, logging, os, random, sys, warnings
import numpy as np
before = (dict(os.environ), random.getstate(), np.random.get_state()[1].tolist(), list(warnings.filters))
loggers, handlers, level = set(logging.root.manager.loggerDict), list(logging.root.handlers), logging.root.level
import testbed, streams, analysis
{more}
after = (dict(os.environ), random.getstate(), np.random.get_state()[1].tolist(), list(warnings.filters))
heavy = [m for m in ("torch", "transformers", "avalanche", "ray", "pandas", "matplotlib") if m in sys.modules]
configured = [n for n, l in logging.root.manager.loggerDict.items()
              if n not in loggers and isinstance(l, logging.Logger) and n.split(".")[0] in ("testbed", "streams", "analysis", "root")]
print(json.dumps({{"same": [a == b for a, b in zip(before, after)], "heavy": heavy, "loggers": configured,
                  "root": handlers == logging.root.handlers and level == logging.root.level}}))
"""


def fresh(code: str) -> dict:
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    assert out.stderr == ""
    return json.loads(out.stdout)


def test_importing_the_packages_does_nothing() -> None:
    found = fresh(QUIET.format(more=""))
    assert found == {"same": [True] * 4, "heavy": [], "loggers": [], "root": True}


def test_the_core_and_the_loaders_load_no_torch() -> None:
    modules = "import testbed.events, testbed.schema, testbed.registry, testbed.grading, streams.base, streams.okedit, streams.world"
    found = fresh(QUIET.format(more=modules))
    assert found == {"same": [True] * 4, "heavy": [], "loggers": [], "root": True}


def test_analysis_loads_no_torch() -> None:
    found = fresh(QUIET.format(more="import analysis.report, analysis.__main__"))
    assert not {"torch", "transformers", "ray", "avalanche"} & set(found["heavy"])


def test_editors_change_no_seed_and_no_environment() -> None:
    """The scan imports torch and transformers; random state and environment stay as they were."""
    more = "from testbed.registry import EDITORS\nEDITORS.names()\nimport torch\nassert torch.initial_seed() == seed"
    found = fresh("import torch\nseed = torch.initial_seed()\n" + QUIET.format(more=more))
    assert found["same"][1:3] == [True, True]
    assert found["root"]


def test_editors_that_need_avalanche_are_listed_without_importing_it() -> None:
    more = "from testbed.registry import EDITORS\nassert any(n.startswith('avalanche:') for n in EDITORS.names())"
    more += "\nfrom testbed.config import RunConfig\nassert RunConfig(editor=('avalanche:naive',)).problems() == []"
    assert "avalanche" not in fresh(QUIET.format(more=more))["heavy"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_stay_readable(path: Path) -> None:
    """Under 300 lines, at most seven parameters."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            a = node.args
            given = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]
            assert len(given) <= 7, f"{name_of(path)}: {node.name} takes {len(given)}"
