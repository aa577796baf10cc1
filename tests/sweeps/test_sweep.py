"""Grids: every combination once, by ids that nothing but the cell moves; sweeps: done, failed, skipped and compared cells."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from analysis.figures.batches import batches, by_batch
from analysis.reporting.sweep import main as show
from analysis.reporting.sweep import write_sweep
from testbed import sweep as sweeps
from testbed.experiment.config import BadConfig, RunConfig
from testbed.sweep import Board, SweepConfig, main, parse, sweep
from testbed.sweeps.grid import expand, run_cell
from tests.helpers.fake_run import Plan, fake_run
from tests.helpers.models import folder

OUT = Path("/tmp/no-such-sweep")
AXES = {
    "editor": st.lists(st.sampled_from(["noop", "finetune", "balancedit", "finetune[lr=0.1]"]), min_size=1, max_size=3),
    "seed": st.lists(st.integers(0, 5), min_size=1, max_size=2),
    "edits": st.lists(st.integers(1, 9), min_size=1, max_size=2),
    "batch": st.lists(st.integers(1, 4), min_size=1, max_size=2),
    "set": st.lists(st.lists(st.sampled_from(["stream.repeats=2", "finetune.lr=0.5"]), max_size=2, unique=True), min_size=1, max_size=2),
}
GRIDS = st.fixed_dictionaries({}, optional=AXES)


def known(values: dict[str, Any]) -> dict[str, Any]:
    """A grid whose settings all have an owner."""
    editors = values.get("editor", RunConfig().editor)
    has = any(e.startswith("finetune") for e in editors)
    return values if has or "set" not in values else {**values, "set": [[s for s in v if s.startswith("stream")] for v in values["set"]]}


@settings(max_examples=25, deadline=None)  # an example checks every cell of two grids
@given(GRIDS, st.randoms(use_true_random=False))
def test_cells_are_unique_and_the_same_in_any_order(values: dict[str, Any], random: Any) -> None:
    values = known(values)
    grid = expand(values, OUT)
    shuffled = {k: random.sample(v, len(v)) for k, v in random.sample(list(values.items()), len(values))}
    other = expand(shuffled, OUT)
    assert {i: c.config for i, c in grid.cells.items()} == {i: c.config for i, c in other.cells.items()}
    assert len({c.folder for c in grid.cells.values()}) == len(grid.cells)
    assert all(i == c.id for i, c in grid.cells.items())
    assert {i for ids in grid.comparisons.values() for i in ids} == set(grid.cells)


@settings(max_examples=12, deadline=None)
@given(GRIDS, st.integers(6, 9))
def test_a_grid_that_grows_keeps_its_cells(values: dict[str, Any], seed: int) -> None:
    values = known(values)
    more = {**values, "seed": [*values.get("seed", [0]), seed]}
    assert expand(values, OUT).cells.items() <= expand(more, OUT).cells.items()


def test_every_combination_is_a_cell() -> None:
    grid = expand({"editor": "noop,finetune", "seed": [0, 1, 2], "batch": [1, 10]}, OUT)
    seen = {(c.editor, c.config.seed, c.config.batch) for c in grid.cells.values()}
    assert seen == {(e, s, b) for e in ("noop", "finetune") for s in (0, 1, 2) for b in (1, 10)}
    assert list(grid.comparisons) == ["batch=1", "batch=10"]
    assert [len(ids) for ids in grid.comparisons.values()] == [6, 6]


def test_settings_go_to_the_cells_of_their_editor_alone() -> None:
    values = {"editor": ["noop", "finetune"], "set": [["finetune.lr=0.1"], ["finetune.lr=0.2", "stream.repeats=2", "probes.end=4"]]}
    grid = expand(values, OUT)
    got = {(c.editor, c.config.set) for c in grid.cells.values()}
    assert got == {
        ("noop", ()),
        ("noop", ("stream.repeats=2", "probes.end=4")),
        ("finetune", ("finetune.lr=0.1",)),
        ("finetune", ("finetune.lr=0.2", "stream.repeats=2", "probes.end=4")),
    }
    once = expand({"editor": ["noop", "finetune"], "set": [["finetune.lr=0.1"], ["finetune.lr=0.2"]]}, OUT)
    assert len(once.cells) == 3
    assert [len(ids) for ids in once.comparisons.values()] == [2, 2]


def test_what_shares_the_unedited_models_answers_is_not_started_together() -> None:
    cells = list(expand({"seed": [0, 1, 2], "editor": ["noop", "finetune"]}, OUT).cells.values())
    assert [c.config.seed for c in cells] == [0, 1, 2, 0, 1, 2]


WRONG = [
    ({"edit": 3}, r"a sweep has no field 'edit'. Did you mean edits\? There are: .*batch"),
    ({"resume": "x", "bach": 1}, r"(?s)resume cannot stand in a sweep.*has no field 'bach'. Did you mean batch\?"),
    ({"editor": ["noop", "balancdit"]}, "no editor is called 'balancdit'. Did you mean balancedit"),
    ({"seed": []}, "seed names no value"),
    ({"editor": []}, "editor names no value"),
    ({"editor": 5}, "editor must be a name or a list of names, got 5"),
    ({"editor": None}, "editor must be a name or a list of names, got None"),
    ({"editor": [["noop"]]}, r"editor must be a name or a list of names, got \[\['noop'\]\]"),
    ({"seed": {"a": 1}}, "seed={'a': 1}: expected one value"),
    ({"edits": [1, "many"]}, "edits='many': expected a whole number"),
    ({"edits": [0, 5], "batch": 0}, r"(?s)--edits must be 1 or more, got 0.*--batch must be 1 or more, got 0"),
    ({"editor": "noop", "set": ["finetune.lr=1"]}, r"set names finetune, which takes part in no cell \(benchmarks, noop, probes, stream\)"),
    ({"editor": "noop", "set": ["lr"]}, "--set 'lr' is not of the form"),
    ({"stream": ["okedit"]}, "no stream is called 'okedit'"),
]


@pytest.mark.parametrize(("values", "message"), WRONG, ids=range(len(WRONG)))
def test_a_bad_grid_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        expand(values, OUT)


def written(root: Path, text: str) -> Path:
    (root / "sweep.yaml").write_text(text)
    return root / "sweep.yaml"


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = written(tmp_path, "cpus: 2\nretries: 1\neditor: [noop]\nprobe-budget: 50\nout: elsewhere\n")
    config, values = parse([str(file), "--retries", "5"])
    assert (config.cpus, config.retries, config.folder) == (2, 5, Path("elsewhere"))
    assert values == {"editor": ["noop"], "probe_budget": 50}
    assert parse([str(written(tmp_path, "edits: 3"))])[0].folder == Path("runs/sweep")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cpus: 0", "cpus must be 1 or more, got 0"),
        ("gpus: -1\nretries: -2", "gpus must be 0 or more, got -1.0"),
        ("cpus: two", "cpus='two': expected a whole number"),
        ("- a", "must hold fields and values, found list"),
        ("edits: [1", "cannot be read"),
        ("editor: [nop]", "no editor is called 'nop'"),
    ],
)
def test_a_bad_file_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    assert main([str(written(tmp_path, text)), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    file = written(tmp_path, "editor: noop")
    assert main([str(file), "--out", str(tmp_path)]) == 2
    assert "is not an empty folder and holds no sweep: choose another --out" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["sweep.yaml", "thesis.txt"]


def test_an_interrupted_sweep_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeps, "sweep", interrupted)
    assert main([str(written(tmp_path, "editor: noop"))]) == 130
    assert "Go on with the same command." in capsys.readouterr().err


def test_the_table_distinguishes_cells_and_shows_their_steps(tmp_path: Path) -> None:
    grid = expand({"editor": ["balancedit[w_pos=0.25]", "noop"], "batch": [1, 10]}, tmp_path / "out")
    board = Board(tmp_path / "out", grid)
    first = next(iter(grid.cells.values()))
    first.log.parent.mkdir(parents=True)
    first.log.write_text("begun\n")
    (first.folder / "balancedit-w_pos=0.25" / "state").mkdir(parents=True)
    (first.folder / "balancedit-w_pos=0.25" / "state" / "step-000050.safetensors").touch()
    board.update()
    screen = Console(width=120, record=True, file=io.StringIO())
    screen.print(board.table())
    lines = [line.split() for line in screen.export_text().splitlines()]
    assert lines[0] == ["1", "running,", "3", "waiting"]
    assert lines[2] == ["balancedit[w_pos=0.25]", "0", "running", "50", "batch=1"]
    assert lines[3] == ["balancedit[w_pos=0.25]", "0", "waiting", "batch=10"]
    assert [line[0] for line in lines[4:6]] == ["noop", "noop"]
    assert board.line() == "cells: 1 running, 3 waiting; balancedit[w_pos=0.25] of order 0 after step 50"


def test_on_a_terminal_the_table_is_live_and_elsewhere_a_line_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board(tmp_path / "out", expand({"editor": "noop"}, tmp_path / "out"))

    def shown(terminal: bool) -> str:
        out = io.StringIO()
        with sweeps._live(board, Console(file=out, force_terminal=terminal, width=80)) as live:
            live()
            live()
        return out.getvalue()

    assert "waiting" in shown(terminal=True)
    assert shown(terminal=False) == ""  # no minute has passed
    monkeypatch.setattr(sweeps, "LINE_SECONDS", 0.0)
    assert shown(terminal=False) == "cells: 1 waiting\n" * 2


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(BadConfig, match=r"ray is not installed .*pip install 'lifelong-editing-testbed\[sweep\]'"):
        sweep(SweepConfig(Path("x.yaml")), {"editor": "noop"}, Console())


class FakeRay:
    """What a sweep asks of Ray before it hands out work; `has` are the resources of each node."""

    def __init__(self, *has: dict[str, float], error: Exception | None = None) -> None:
        self.has, self.error, self.started, self.ended = has, error, {}, False

    def init(self, **given: Any) -> None:
        self.started = given
        if self.error:
            raise self.error

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": r} for r in self.has]

    def shutdown(self) -> None:
        self.ended = True


def test_without_an_address_this_machine_is_used_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = FakeRay({"CPU": 2.0})
    monkeypatch.setattr(sweeps, "_import_ray", lambda: ray)
    monkeypatch.setattr(sweeps, "_outcomes", lambda ray, config, cells, live: [(c, None) for c in cells])
    board = sweep(SweepConfig(tmp_path / "x.yaml", out=tmp_path / "out"), {"editor": "noop"}, Console())
    assert ray.started["address"] == "local"
    assert ray.ended
    assert list(board.state.values()) == ["done"]
    assert [c.config.device for c in board.grid.cells.values()] == ["cpu"]


def test_a_cluster_that_is_not_there_or_too_small_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SweepConfig(tmp_path / "x.yaml", out=tmp_path / "out", address="nowhere:1", gpus=2)
    monkeypatch.setattr(sweeps, "_import_ray", lambda: FakeRay(error=ConnectionError("no one answers")))
    with pytest.raises(BadConfig, match="Ray cannot be reached at --address nowhere:1: no one answers"):
        sweep(config, {"editor": "noop"}, Console())
    small = FakeRay({"CPU": 8.0, "GPU": 1.0}, {"CPU": 4.0})
    monkeypatch.setattr(sweeps, "_import_ray", lambda: small)
    with pytest.raises(BadConfig, match=r"no node has 1 CPUs and 2 GPUs for a run \(nodes: 8 CPUs, 1 GPUs; 4 CPUs, 0 GPUs\)"):
        sweep(config, {"editor": "noop"}, Console())
    assert small.ended


def done_sweep(root: Path, fail: tuple[str, int] | None = None, **more: Any) -> tuple[SweepConfig, dict[str, Any], Board]:
    """A sweep of two editors and two seeds whose cells hold made-up runs; one of them failed."""
    values = {"editor": ["noop", "finetune"], "seed": [0, 1], "edits": 40, **more}
    config = SweepConfig(root / "s.yaml", out=root / "out")
    grid = expand(values, config.folder, "cpu")
    for cell in grid.cells.values():
        if (cell.editor, cell.config.seed) != fail:
            seed = cell.config.seed
            plan = Plan(edits=40, years=3, editors=(cell.editor,), seed=seed, panel=16)
            fake_run(cell.folder, plan, seed=seed, schedule_hash=f"s{seed}")
            (cell.folder / "report.html").write_text("a report")
    board = Board(config.folder, grid)
    for cell in grid.cells.values():
        if board.state[cell.id] == "waiting":
            board.set(cell, "Traceback\n  somewhere\nValueError: <b>broken</b>")
    return config, values, board


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.reporting.report.catalogue.draw_all", lambda context: {})


def test_finished_cells_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, values, _ = done_sweep(tmp_path)
    monkeypatch.setattr(sweeps, "_cluster", None)
    board = sweep(config, values, Console())
    assert set(board.state.values()) == {"done"}


@pytest.mark.ci
@pytest.mark.usefixtures("no_figures")
def test_one_report_pools_seeds_and_compares_editors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, _, _ = done_sweep(tmp_path)
    (summary,) = write_sweep(config.folder).values()
    assert set(summary["editors"]) == {"noop", "finetune"}
    assert summary["run"]["seeds"] == [0, 1]
    page = (config.folder / "report.html").read_text()
    assert "4 of 4 cells are done" in page
    assert 'href="comparison/report.html"' in page
    assert (config.folder / "comparison" / "report.html").is_file()
    lines = (config.folder / "cells.csv").read_text().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("editor,seed,stream,model,batch,edits,set,state,folder")
    assert show([str(config.folder)]) == 0
    assert show([str(tmp_path)]) == 2
    assert "sweep.json is missing" in capsys.readouterr().err


@pytest.mark.usefixtures("no_figures")
def test_a_failed_cell_is_named_and_its_editor_left_out(tmp_path: Path) -> None:
    config, _, board = done_sweep(tmp_path, fail=("finetune", 1))
    (summary,) = write_sweep(config.folder).values()
    assert set(summary["editors"]) == {"noop"}
    page = (config.folder / "report.html").read_text()
    assert "3 of 4 cells are done" in page
    assert "left out: finetune, seed 1: failed" in page
    assert "left out: finetune, seed 0: done, but this editor is not done in every seed" in page
    assert "ValueError: &lt;b&gt;broken&lt;/b&gt;" in page
    assert "<b>" not in page
    table = Console(width=200, record=True)
    table.print(board.table())
    assert "3 done, 1 failed" in table.export_text()


@pytest.mark.ci
@pytest.mark.usefixtures("no_figures")
def test_batch_sizes_have_a_figure_together(tmp_path: Path) -> None:
    config, _, _ = done_sweep(tmp_path, batch=[1, 10])
    found = write_sweep(config.folder)
    assert set(found) == {"batch=1", "batch=10"}
    assert (config.folder / "batch.png").is_file()
    assert not (config.folder / "batch-2.png").exists()
    page = (config.folder / "report.html").read_text()
    assert page.count("<figure>") == 1
    value = found["batch=10"]["editors"]["finetune"]["edit_success_gen"]["value"]
    assert f"finetune, 10 edits in a step: Success, end {100 * value:.1f}" in page


def test_points_by_batch_size_are_those_of_the_summaries() -> None:
    def summary(editor: str, value: float) -> dict[str, Any]:
        return {"editors": {editor: {"edit_success_gen": {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 20}}}}

    points = by_batch({100: summary("a", 0.25), 1: summary("a", 0.75)})
    assert set(points["metric"]) == {"edit_success"}
    assert points[["editor", "x", "value"]].to_numpy().tolist() == [["a", 1, 0.75], ["a", 100, 0.25]]
    assert batches({1: summary("a", 0.5)}) is None


@pytest.mark.usefixtures("no_figures")
def test_where_nothing_is_done_the_page_says_so(tmp_path: Path) -> None:
    config, _, _ = done_sweep(tmp_path)
    path = config.folder / "sweep.json"
    stored = json.loads(path.read_text())
    for cell in stored["cells"].values():
        cell["state"] = "failed"
    path.write_text(json.dumps(stored))
    assert write_sweep(config.folder) == {}
    assert "nothing can be compared" in (config.folder / "report.html").read_text()


@pytest.mark.usefixtures("no_figures")
def test_failed_cells_end_with_1_and_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, _, board = done_sweep(tmp_path, fail=("noop", 0))
    assert sweeps._finish(board, 1.0) == 1
    printed = capsys.readouterr()
    assert "3 of 4 cells done in 1 s, 1 failed" in printed.out
    assert "failed: noop-0-" in printed.err
    assert "ValueError: <b>broken</b>" in printed.err


@pytest.mark.usefixtures("no_figures")
def test_a_cell_is_made_resumed_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = ({"prompt": f"Who owns the ship {i}?", "target": f"Ann {i}"} for i in range(9))
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in facts))
    quick = {"edits": 4, "save_every": 2, "probe_budget": 10, "max_new_tokens": 1, "set": ["finetune.steps=1"]}
    where = {"stream": "jsonl:facts.jsonl", "data_root": str(tmp_path), "model": str(folder("gpt2"))}
    editors = ["finetune", "finetune[layer=99]"]
    cell, wrong = expand({**where, **quick, "editor": editors}, tmp_path / "out", "cpu").cells.values()

    with monkeypatch.context() as patch:
        patch.setattr("testbed.experiment.runner.finish", lambda out: 1 / 0)
        patch.setattr("testbed.model.progress.LINE_SECONDS", 0.0)
        assert (run_cell(cell, 1) or "").splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert (cell.begun, cell.done, cell.step) == (True, False, 4)
    assert run_cell(cell, 1) is None
    assert cell.done
    assert [line.split(" on ")[0] for line in cell.log.read_text().splitlines() if "process" in line] == ["started", "resumed"]
    before = cell.log.read_text()
    assert "finetune: 4 of 4, " in before
    assert run_cell(cell, 1) is None
    assert cell.log.read_text() == before
    assert "layer 99 does not exist" in (run_cell(wrong, 1) or "")
    assert "Traceback" not in (run_cell(wrong, 1) or "")


def test_models_in_folders_are_named_absolutely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder("gpt2").parent)
    (cell,) = expand({"editor": "noop", "model": folder("gpt2").name}, tmp_path).cells.values()
    assert cell.config.model == str(folder("gpt2"))
    monkeypatch.chdir(tmp_path)
    (cell,) = expand({"editor": "noop"}, Path("here")).cells.values()
    assert (cell.config.model, cell.folder.is_absolute()) == ("tiny", True)
