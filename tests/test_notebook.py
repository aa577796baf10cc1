"""The notebook runs from its first cell to its last, in an empty folder, and shows what its text says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install '.[docs]' brings what runs notebooks")
from nbclient import NotebookClient  # noqa: E402

ROOT = Path(__file__).parents[1]
PATH = ROOT / "docs" / "notebook.ipynb"


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = nbformat.read(PATH, as_version=4).cells
    assert [c for c in cells if c.cell_type == "code" and (c.outputs or c.execution_count)] == []


@pytest.mark.ci
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    book = nbformat.read(PATH, as_version=4)
    NotebookClient(book, timeout=400, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    table, curve, explanation = [c.outputs for c in book.cells if c.cell_type == "code"][1:]
    assert [line.split()[0] for line in table[0].text.splitlines()] == ["noop", "finetune", "balancedit"]
    assert any("image/png" in o.get("data", {}) for o in curve)
    assert "edits were learned and lost" in explanation[0].text
    assert sorted(p.name for p in tmp_path.iterdir()) in ([], ["ipython"])
