"""The examples in the documentation run, and the files, papers and tests that it cites exist."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from testbed.core.registry import EDITORS
from testbed.experiment.config import RunConfig
from testbed.sweeps.grid import expand

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
FIDELITY = ROOT / "docs" / "fidelity.md"
REPORTS = sorted((ROOT / "docs" / "reports").glob("*.md"))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_the_example_in_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("python.md", "python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("analysis.reporting.report.catalogue.draw_all", lambda context: {})
    exec(compile(example, "docs/python.md", "exec"), {})
    printed = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [line.split()[0] for line in printed[-2:]] == ["4", "5"]
    assert "'value': " in printed[-3]
    names = [line.rpartition("[")[2] for line in printed[-2:]]
    assert names[0] == "]"
    assert re.fullmatch(r"'[0-9a-f]{16}'\]", names[1])


def test_the_sample_sweep_is_a_grid_of_as_many_cells_as_the_page_says(tmp_path: Path) -> None:
    (text,) = blocks("sweeps.md", "yaml")
    own = {"cpus", "gpus", "retries", "out", "address"}
    grid = expand({k: v for k, v in yaml.safe_load(text).items() if k not in own}, tmp_path)
    told = re.search(r"\((\d+) above\)", (ROOT / "docs" / "sweeps.md").read_text())
    assert told is not None
    assert len(grid.cells) == int(told[1])
    assert all(c.config.problems() == [] for c in grid.cells.values())


def papers(*pages: Path) -> set[str]:
    return {x for page in pages for x in re.findall(r"arXiv (\d{4}\.\d{5})", page.read_text())}


def test_the_citation_names_every_paper_of_a_method() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(citation)
    cited = {r["url"].rpartition("/")[2] for r in citation["references"] if "url" in r}
    assert papers(FIDELITY, *REPORTS) <= cited
    assert all(r["title"] and r["authors"] and r["year"] for r in citation["references"])
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{citation["version"]}"' in project


def test_the_page_on_fidelity_names_the_paper_of_every_report() -> None:
    assert len(papers(*REPORTS)) > 15
    assert papers(*REPORTS) <= papers(FIDELITY)


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_report_is_in_the_list_of_reports() -> None:
    listed = (ROOT / "docs" / "reports" / "README.md").read_text()
    assert [r.name for r in REPORTS if r.name != "README.md" and f"({r.name})" not in listed] == []


def test_every_file_of_the_project_that_a_page_names_exists() -> None:
    named = re.compile(r"`((?:testbed|streams|analysis|tests|docs)/[\w/.-]*\w/?)`")
    for page in (*PAGES, ROOT / "CONTRIBUTING.md"):
        assert [n for n in named.findall(page.read_text()) if not (ROOT / n).exists()] == [], page.name


def numbered_tests() -> dict[int, set[str]]:
    """Names of the functions `test_NN_...` and `check_NN_...` that hold the promises of a codebook, by number."""
    found: dict[int, set[str]] = defaultdict(set)
    for folder in ("tests/editors/codebook", "tests/helpers"):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.FunctionDef) and (m := re.match(r"(?:test|check)_(\d\d)_", node.name)):
                    found[int(m[1])].add(node.name)
    return dict(found)


def test_the_page_on_codebook_promises_names_the_tests_that_hold_each() -> None:
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.*) \|$", (ROOT / "docs" / "codebook-promises.md").read_text(), re.MULTILINE)
    assert [int(n) for n, _, _ in rows] == list(range(1, 41))
    assert all(promise.endswith(".") for _, promise, _ in rows)
    assert {int(n): set(re.findall(r"`((?:test|check)_\w+)`", tests)) for n, _, tests in rows} == numbered_tests()


def test_the_examples_name_editors_and_fields_that_exist() -> None:
    (example,) = blocks("python.md", "python")
    assert set(re.findall(r'editor="(\w+)"', example)) <= set(EDITORS.names())
    assert hasattr(RunConfig(), "probe_budget")


def test_the_tree_in_the_layout_is_the_tree() -> None:
    (block,) = re.findall(r"## The tree\n.*?```\n(.*?)```", (ROOT / "docs" / "layout.md").read_text("utf-8"), re.DOTALL)
    told: dict[str, list[str]] = {}
    for line in block.splitlines():
        words = line.split()
        folder = words.pop(0) if not line.startswith(" ") else list(told)[-1]
        told.setdefault(folder, []).extend(words)
    found: dict[str, list[str]] = {}
    for path in (p for name in ("testbed", "streams", "analysis") for p in (ROOT / name).rglob("*.py") if p.name != "__init__.py"):
        found.setdefault(f"{path.parent.relative_to(ROOT)}/", []).append(path.stem)
    assert {k: sorted(v) for k, v in told.items()} == {k: sorted(v) for k, v in found.items()}
