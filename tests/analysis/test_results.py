"""Kept summaries of a sweep, and the tables of a page made from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.reading.records import BadRun
from analysis.reporting import results
from analysis.reporting.report import write_all
from tests.helpers.fake_run import Plan, fake_run

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(p for p in DOCS.rglob("*.md") if "<!-- table:" in p.read_text("utf-8"))


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of three orders of two editors, of which one lacks its last order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("analysis.reporting.report.catalogue.draw_all", lambda context: {})
        return made_sweep(tmp_path_factory.mktemp("sweep"))


def made_sweep(out: Path) -> Path:
    """Cells with made-up runs, their comparison, and sweep.json."""
    cells = {}
    for seed in range(3):
        for editor in ("finetune", "balancedit"):
            folder = out / "cells" / f"{editor}-{seed}"
            done = (editor, seed) != ("balancedit", 2)
            cells[f"{editor}{seed}"] = {"folder": f"cells/{editor}-{seed}", "state": "done" if done else "waiting"}
            if done:
                about = {"stream": "fake-yearly", "edits": 40, "batch": 1, "probe_budget": 800, "data_root": "/a/place"}
                fake_run(folder, Plan(edits=40, years=2, editors=(editor,), seed=seed), seed=seed, schedule_hash=str(seed), config=about)
                write_all(folder, formats=(), tables=(), replicates=50)
    write_all([out / "cells" / f"finetune-{s}" for s in range(3)], formats=(), tables=(), to=out / "comparison", replicates=50)
    (out / "sweep.json").write_text(json.dumps({"comparisons": {}, "cells": cells}))
    return out


def test_finished_cells_are_kept_and_the_page_has_their_numbers(sweep: Path, tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    kept = results.keep(sweep, tmp_path / "results" / "a")
    assert sorted(p.name for p in kept) == [
        "balancedit-0.json",
        "balancedit-1.json",
        *(f"finetune-{s}.json" for s in range(3)),
    ]
    assert not any("/a/place" in p.read_text() for p in kept)
    page.write_text("before\n<!-- table: a edit_success seconds_per_edit -->\nold\n<!-- end -->\nafter\n")
    assert results.main(["write", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- table") and text.endswith("<!-- end -->\nafter\n") and "old" not in text
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| `")}
    pooled = json.loads((sweep / "comparison" / "summary.json").read_text())["editors"]["finetune"]["edit_success_gen"]
    assert rows["`finetune`"].split("|")[2].strip() == "3" and f" {100 * pooled['value']:.1f} [" in rows["`finetune`"]
    low, high = (float(end) for end in rows["`finetune`"].split("[")[1].split("]")[0].split(","))
    assert [low, high] == pytest.approx([100 * pooled["low"], 100 * pooled["high"]], abs=4), "as the answers themselves give"
    assert rows["`balancedit`"].split("|")[2].strip() == "2, no claim"
    assert "orders 0, 1, 2" in text
    twice = json.loads((tmp_path / "results" / "a" / "finetune-0.json").read_text())
    (tmp_path / "results" / "a" / "finetune-old.json").write_text(json.dumps(twice))
    with pytest.raises(BadRun, match="holds two summaries of finetune in order 0"):
        results.write_page(page)
    (tmp_path / "results" / "a" / "finetune-old.json").unlink()
    again = page.read_text()
    assert results.write_page(page) == again


def test_what_cannot_be_shown_is_named(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadRun, match="holds no summaries"):
        results.table(tmp_path, ["edit_success"])
    with pytest.raises(BadRun, match="unknown metrics: nothing"):
        results.table(tmp_path, ["nothing"])
    assert results.main(["keep", str(tmp_path), str(tmp_path / "to")]) == 2
    assert "sweep.json is missing" in capsys.readouterr().err
    assert results.main([]) == 2


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_tables_of_the_documents_are_those_of_the_kept_summaries(page: Path) -> None:
    assert results.write_page(page) == page.read_text("utf-8")
