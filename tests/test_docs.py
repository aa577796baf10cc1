"""What the documentation shows runs, and what it cites is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from testbed.core.registry import EDITORS
from testbed.experiment.config import RunConfig
from testbed.sweeps.grid import expand

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


def test_the_example_in_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = blocks("python.md", "python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("analysis.reporting.report.plots.draw_all", lambda scene: {})
    exec(compile(example, "docs/python.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["finetune", "balancedit", "4", "5"]
    names = [line.rpartition("[")[2] for line in printed[2:]]
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


def test_the_citation_names_every_paper_of_a_method() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(citation)
    cited = {r["url"].rpartition("/")[2] for r in citation["references"] if "url" in r}
    assert set(re.findall(r"arXiv (\d{4}\.\d{5})", (ROOT / "docs" / "fidelity.md").read_text())) <= cited
    assert all(r["title"] and r["authors"] and r["year"] for r in citation["references"])
    project = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{citation["version"]}"' in project


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_examples_name_editors_and_fields_that_exist() -> None:
    (example,) = blocks("python.md", "python")
    assert set(re.findall(r'editor="(\w+)"', example)) <= set(EDITORS.names())
    assert hasattr(RunConfig(), "probe_budget")
