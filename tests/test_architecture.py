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

from testbed.core.registry import EDITORS, STREAMS

ROOT = Path(__file__).parent.parent
PACKAGES = ("testbed", "streams", "analysis")
FILES = sorted(p for name in PACKAGES for p in (ROOT / name).rglob("*.py"))
NAMERS = {f"testbed/{name}.py" for name in ("run", "check", "tune", "sweep", "bench/common", "experiment/config")}
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


FLOORS = {
    "testbed.core": 0,
    "streams": 1,
    "testbed.model": 1,
    "testbed.storage": 1,
    "testbed.benchmarks": 2,
    "testbed.monitors": 2,
    "testbed.probes": 2,
    "testbed.editors": 3,
    "testbed.experiment": 4,
    "testbed.pretraining": 4,
    "testbed.sweeps": 5,
    "testbed.tuning": 5,
    "testbed.integrations": 5,
    "testbed.bench": 5,
    "testbed.checks": 5,
    "testbed": 6,
    "testbed.api": 7,
    "analysis": 3,
}
"""The floor of each package; `testbed` itself holds command lines alone. A file imports from its own floor and from lower ones."""
BESIDE = {("testbed.storage", "testbed.model"), ("testbed.monitors", "testbed.probes"), ("testbed.benchmarks", "testbed.probes")}
"""Packages of one floor of which the first stands on the second."""


def package_of(module: str) -> str:
    """The package whose floor a module or a file lies on."""
    parts = module.removesuffix(".py").replace("/", ".").split(".")
    inner = ".".join(parts[:2])
    return inner if parts[0] == "testbed" and (ROOT / "testbed" / parts[1] if len(parts) > 1 else ROOT / "none").is_dir() else parts[0]


def test_the_scan_sees_the_project() -> None:
    assert {"testbed/experiment/loop.py", "streams/base.py", "analysis/reading/load.py"} <= {name_of(p) for p in FILES}


def test_only_command_lines_lie_loose_in_the_package() -> None:
    loose = sorted(p.stem for p in (ROOT / "testbed").glob("*.py"))
    assert len(loose) <= 10
    assert all("__main__" in (ROOT / "testbed" / f"{n}.py").read_text(encoding="utf-8") for n in loose if n != "__init__")


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_from_its_own_floor_or_lower_ones(path: Path) -> None:
    own = package_of(name_of(path))
    assert own in FLOORS, f"{name_of(path)} lies on no floor: add its package to FLOORS"
    for module in imports(path):
        other = package_of(module)
        if module.split(".")[0] not in PACKAGES or other == own:
            continue
        lower = FLOORS[other] < FLOORS[own] or (own, other) in BESIDE
        assert lower, f"{name_of(path)} (floor {FLOORS[own]}) imports {module} (floor {FLOORS[other]})"


def test_modules_import_each_other_in_no_circle() -> None:
    """Imports inside functions count: a circle that hides in a function is a circle."""
    named = {name_of(p).removesuffix(".py").removesuffix("/__init__").replace("/", "."): p for p in FILES}
    graph = {m: {n for i in imports(p) for n in (i, i.rpartition(".")[0]) if n in named and n != m} for m, p in named.items()}
    while leaves := [m for m, others in graph.items() if not others & graph.keys()]:
        for m in leaves:
            del graph[m]
    assert not graph, f"these modules import each other in circles: {sorted(graph)}"


@pytest.mark.parametrize("path", [p for p in FILES if package_of(name_of(p)) == "testbed.core"], ids=name_of)
def test_the_core_needs_the_standard_library_and_numpy_alone(path: Path) -> None:
    assert not top(imports(path)) - sys.stdlib_module_names - {"numpy", "testbed"}


def test_grading_needs_the_standard_library_alone() -> None:
    assert top(imports(ROOT / "testbed" / "core" / "grading.py")) <= sys.stdlib_module_names | {"__future__"}


@pytest.mark.parametrize("path", [p for p in FILES if name_of(p).startswith(("streams/", "analysis/"))], ids=name_of)
def test_streams_and_analysis_know_the_core_alone_and_no_torch(path: Path) -> None:
    own, found = name_of(path).split("/")[0], list(imports(path))
    others = [m for m in found if m.split(".")[0] in PACKAGES and not inside(m, own)]
    assert [m for m in others if not inside(m, "testbed.core")] == []
    assert not top(iter(found)) & {"torch", "transformers", "ray", "avalanche"}


def test_avalanche_is_imported_by_its_editors_and_its_integration_alone() -> None:
    users = [name_of(p) for p in FILES if "avalanche" in top(imports(p))]
    assert users
    assert all(u.startswith(("testbed/integrations/avalanche/", "testbed/editors/continual/_")) for u in users)


def test_the_harness_lives_in_its_integration_alone() -> None:
    assert [name_of(p) for p in FILES if "lm_eval" in top(imports(p))] == ["testbed/integrations/lm_eval.py"]


def test_private_modules_are_few_and_say_why() -> None:
    private = [p for p in FILES if p.name.startswith("_") and not p.name.startswith("__")]
    assert [name_of(p) for p in private if "private" not in (ast.get_docstring(ast.parse(p.read_text("utf-8"))) or "")] == []


def test_no_class_name_stands_for_two_classes() -> None:
    where: dict[str, list[str]] = {}
    for p in FILES:
        for node in ast.walk(ast.parse(p.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                where.setdefault(node.name, []).append(name_of(p))
    assert {name: files for name, files in where.items() if len(files) > 1} == {}


def test_no_test_module_imports_from_another() -> None:
    tests = sorted((ROOT / "tests").rglob("test_*.py"))
    assert tests
    found = {name_of(p): [m for m in imports(p) if any(part.startswith("test_") for part in m.split(".")[:-1])] for p in tests}
    assert {name: modules for name, modules in found.items() if modules} == {}


def test_the_loop_and_the_probes_know_no_plug_in() -> None:
    bases = [f"testbed.{package}.base" for package in ("editors", "probes", "monitors")]
    contracts = (*bases, "testbed.editors.work", "streams.base", "streams.arrange")
    for path in [p for p in FILES if package_of(name_of(p)) in ("testbed.experiment", "testbed.model", "testbed.storage")]:
        known = [m for m in imports(path) if inside(m, "testbed.editors", "testbed.probes", "testbed.monitors", "streams")]
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
        return getattr(node.func, "attr", getattr(node.func, "id", "")) in ("register", "or_world")
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
    core = ("testbed.core.events", "testbed.core.schema", "testbed.core.registry", "testbed.core.grading")
    modules = f"import {', '.join(core)}, streams.base, streams.files.okedit, streams.world.stream"
    found = fresh(QUIET.format(more=modules))
    assert found == {"same": [True] * 4, "heavy": [], "loggers": [], "root": True}


def test_analysis_loads_no_torch() -> None:
    found = fresh(QUIET.format(more="import analysis.reporting.report, analysis.__main__"))
    assert not {"torch", "transformers", "ray", "avalanche"} & set(found["heavy"])


def test_editors_change_no_seed_and_no_environment() -> None:
    """The scan imports torch and transformers; random state and environment stay as they were."""
    more = "from testbed.core.registry import EDITORS\nEDITORS.names()\nimport torch\nassert torch.initial_seed() == seed"
    found = fresh("import torch\nseed = torch.initial_seed()\n" + QUIET.format(more=more))
    assert found["same"][1:3] == [True, True]
    assert found["root"]


def test_editors_that_need_avalanche_are_listed_without_importing_it() -> None:
    more = "from testbed.core.registry import EDITORS\nassert any(n.startswith('avalanche:') for n in EDITORS.names())"
    more += "\nfrom testbed.experiment.config import RunConfig\nassert RunConfig(editor=('avalanche:naive',)).problems() == []"
    assert "avalanche" not in fresh(QUIET.format(more=more))["heavy"]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_stay_readable(path: Path) -> None:
    """At most 400 lines, at most seven parameters."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            a = node.args
            given = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]
            assert len(given) <= 7, f"{name_of(path)}: {node.name} takes {len(given)}"
