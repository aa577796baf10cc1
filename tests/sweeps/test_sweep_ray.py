"""A sweep on Ray's own cluster of several nodes, one of which is killed: everything is made all the same."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from testbed import sweep as sweeps
from testbed.experiment import runner
from testbed.experiment.config import RunConfig
from testbed.sweep import main
from testbed.sweeps.grid import Cell, expand, run_cell
from tests.helpers.models import folder

STORE = 80 * 2**20
EDITS, SAVED = 20, 4
VALUES: dict[str, Any] = {
    "stream": "jsonl:facts.jsonl",
    "editor": ["finetune", "balancedit"],
    "edits": EDITS,
    "save_every": SAVED,
    "probe_budget": 100,
    "max_new_tokens": 2,
    "set": ["finetune.steps=2", "balancedit.steps=2"],
}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that runs nothing and two nodes with one processor each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
    made = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        made.add_node(num_cpus=1, object_store_memory=STORE)
    yield made
    made.shutdown()


def kill_when_both_run(cluster: Any, cells: list[Cell], killed: threading.Event) -> None:
    """End a node without warning as soon as two cells have saved something and neither is done."""
    for _ in range(1500):
        if all(c.step >= SAVED for c in cells):
            cluster.remove_node(max(cluster.worker_nodes, key=str), allow_graceful=False)
            killed.set()
            return
        time.sleep(0.1)


def rows(out: Path, editor: str) -> list[dict[str, Any]]:
    found = [r for p in sorted((out / editor / "records").glob("*.parquet")) for r in pq.read_table(p).to_pylist()]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in found]


@pytest.mark.slow
def test_a_node_dies_and_everything_is_made_all_the_same(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = ({"prompt": f"Who owns the ship {i}?", "target": f"Ann {i}", "previous": f"Bob {i}"} for i in range(40))
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in facts))
    values = {**VALUES, "model": str(folder("gpt2")), "data_root": str(tmp_path)}
    (tmp_path / "sweep.yaml").write_text(json.dumps(values))
    out = tmp_path / "out"
    cells = [*expand(values, out, "cpu").cells.values()]

    def slow(cell: Cell, cpus: int) -> str | None:
        """A run with a pause at each step, so that it can be met in the middle, and without figures; pickled by value."""
        import analysis.reporting.report
        from testbed.experiment import loop

        plain = loop.apply_step
        loop.apply_step = lambda *given: (time.sleep(0.2), plain(*given))[1]
        analysis.reporting.report.catalogue.draw_all = lambda context: {}
        return run_cell(cell, cpus)

    monkeypatch.setattr(sweeps, "run_cell", slow)
    monkeypatch.setattr("analysis.reporting.report.catalogue.draw_all", lambda context: {})
    killed = threading.Event()
    threading.Thread(target=kill_when_both_run, args=(cluster, cells, killed), daemon=True).start()
    code = main([str(tmp_path / "sweep.yaml"), "--out", str(out), "--address", cluster.address])

    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "2 of 2 cells done" in printed.out
    assert killed.is_set()
    logs = [c.log.read_text() for c in cells]
    assert sum("resumed on" in log for log in logs) >= 1
    assert len(list((out / "shared").glob("unedited-*"))) == 1
    for cell in cells:
        assert cell.done
        same_as_undisturbed(cell, tmp_path / cell.editor, monkeypatch)
    assert "2 of 2 cells are done" in (out / "report.html").read_text()
    summary = json.loads((out / "comparison" / "summary.json").read_text())
    assert set(summary["editors"]) == {"finetune", "balancedit"}


def same_as_undisturbed(cell: Cell, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same configuration run by itself, in one go and with nothing shared: the same answers and state, bit for bit."""
    fresh = {
        f: getattr(cell.config, f) for f in ("stream", "editor", "model", "data_root", "edits", "probe_budget", "max_new_tokens", "set")
    }
    monkeypatch.setattr(runner, "finish", lambda out: {})
    runner.study(RunConfig(**fresh, device="cpu", save_every=cell.config.save_every, out=out))
    assert rows(cell.folder, cell.editor)
    assert rows(cell.folder, cell.editor) == rows(out, cell.editor)
    states = [next((place / cell.editor / "state").iterdir()).read_bytes() for place in (cell.folder, out)]
    assert states[0] == states[1]
    assert pq.read_table(cell.folder / "base" / "answers.parquet").equals(pq.read_table(out / "base" / "answers.parquet"))


@pytest.mark.slow
def test_four_editors_three_orders_and_a_node_that_dies(cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny model and the simulated world, twelve cells with their reports; one node is left to end what two began."""
    grid = {"editor": ["noop", "finetune", "balancedit", "scr"], "seed": [0, 1, 2], "edits": 60, "save_every": 20, "probe_budget": 2000}
    (tmp_path / "sweep.yaml").write_text(json.dumps(grid))
    out, killed = tmp_path / "out", threading.Event()
    cells = list(expand(grid, out, "cpu").cells.values())

    def kill_a_node() -> None:
        while sum(c.step >= 20 and not c.done for c in cells) < 2:
            time.sleep(0.1)
        cluster.remove_node(max(cluster.worker_nodes, key=str), allow_graceful=False)
        killed.set()

    threading.Thread(target=kill_a_node, daemon=True).start()
    assert main([str(tmp_path / "sweep.yaml"), "--out", str(out), "--address", cluster.address]) == 0
    assert killed.is_set()
    assert sum("resumed on" in c.log.read_text() for c in cells) >= 1
    assert "12 of 12 cells done" in capsys.readouterr().out
    assert len(list((out / "shared").glob("unedited-*"))) == 3
    summary = json.loads((out / "comparison" / "summary.json").read_text())
    assert set(summary["editors"]) == set(grid["editor"])
    assert summary["run"]["seeds"] == [0, 1, 2]
    assert all((place / "report.html").stat().st_size > 10_000 for place in (out / "comparison", *(c.folder for c in cells)))
