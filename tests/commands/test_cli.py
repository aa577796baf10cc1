"""The command line in real processes: a mistake is a plain line, a finished run leaves a report."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pyarrow.parquet as pq
import pytest

from testbed.core.registry import EDITORS, PROBES, STREAMS
from tests.helpers.models import folder
from tests.helpers.warm_process import ROOT, Done, command

SMALL = ("--edits", 12, "--editor", "noop,finetune", "--max-new-tokens", 2, "--probe-budget", 10, "--device", "cpu")


def run(*argv: Any, **more: Any) -> Done:
    return command("--model", folder("llava"), *argv, **more)


@cache
def finished() -> tuple[Done, Path]:
    """A small real run of two editors."""
    out = Path(mkdtemp(prefix="cli-")) / "a run [1]"
    return run("--out", out, *SMALL, "--set", "finetune.steps=2"), out


def fresh(*argv: str) -> subprocess.CompletedProcess[str]:
    """A command in a process that imports everything itself."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-m", "testbed.run", *argv], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_list_names_every_plug_in_with_one_line() -> None:
    done = fresh("--list")
    assert (done.returncode, done.stderr) == (0, "")
    for registry in (EDITORS, STREAMS, PROBES):
        for name, cls in registry.items():
            assert re.search(rf"^ +{re.escape(name)} +{re.escape(cls.summary[:40])}", done.stdout, re.MULTILINE), name


def test_an_unknown_editor_is_reported_in_one_line_with_near_matches() -> None:
    done = fresh("--editor", "balancdit")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no editor is called 'balancdit'. Did you mean balancedit")
    assert "Traceback" not in done.stderr


def test_all_mistakes_are_reported_at_once() -> None:
    done = run("--editor", "finetun", "--edits", 0, "--stream", "okedit", "--set", "x=1")
    assert done.code == 2
    assert len(done.err.splitlines()) == 4
    assert all(line.startswith("error: ") for line in done.err.splitlines())


WRONG: list[tuple[tuple[Any, ...], str]] = [
    (("--device", "cuda:99"), r"error: device 'cuda:99' cannot be used: .*Try --device cpu or --device auto"),
    (("--device", "gpu"), r"error: device 'gpu' cannot be used"),
    (("--dtype", "float17", "--device", "cpu"), r"error: dtype 'float17' is not known; there are auto, float32"),
    (("--data-root", "/no/such"), r"error: --data-root /no/such is not a folder"),
    (("--data-root", "/usr/include"), r"error: .*/usr/include"),
    (("--model", "nobody/no-such-model"), r"error: model 'nobody/no-such-model' cannot be loaded: .*a hub id needs a network connection"),
    (("--model", "/usr/include"), r"error: model '/usr/include' cannot be loaded"),
    (("--resume", "/no/such"), r"error: /no/such/manifest.json does not exist: /no/such is not a run folder"),
    (("--config", "/no/such.yaml"), r"error: --config /no/such.yaml cannot be read"),
    (("--out", "/dev/null/x"), r"error: .*/dev/null/x"),
]


@pytest.mark.parametrize(("argv", "message"), WRONG, ids=[" ".join(map(str, a)) for a, _ in WRONG])
def test_mistakes_end_with_2_and_plain_words(argv: tuple[Any, ...], message: str) -> None:
    model = () if "--model" in argv or "--resume" in argv else ("--model", folder("llava"))
    done = command(*model, "--edits", 3, "--editor", "noop", *argv)
    assert done.code == 2, done.err
    errors = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert re.search(message, errors[0]), done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_an_unknown_option_is_refused_by_name() -> None:
    done = run("--edit", 3)
    assert done.code == 2
    assert "--edit" in done.out + done.err


def test_a_small_run_leaves_summary_report_figures_and_tables() -> None:
    done, out = finished()
    assert done.code == 0, done.err
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["editors"]) == {"noop", "finetune"}
    assert summary["editors"]["noop"]["edits"]["value"] == 12
    assert "<html" in (out / "report.html").read_text()
    assert list((out / "figures").glob("*.png"))
    assert list((out / "tables").glob("*.csv"))
    assert "finetune" in done.out
    assert f"report: {out / 'report.html'}" in done.out


def test_stand_ins_are_reported_and_nothing_else_is_printed_off_a_terminal() -> None:
    """No bars, no loading notices: standard error holds the run's notes alone."""
    done, out = finished()
    notes = json.loads((out / "manifest.json").read_text())["notes"]
    assert done.err.splitlines() == notes
    assert "the simulated world stands in for files" in done.err
    assert "\r" not in done.err + done.out
    assert "\x1b" not in done.err + done.out


def test_a_folder_in_use_is_refused_and_left_as_it_is() -> None:
    _, out = finished()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    done = run("--out", out, *SMALL)
    assert done.code == 2
    assert f"{out} holds a run already: go on with --resume {out}, or choose another --out" in done.err
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_going_on_with_another_configuration_is_refused_by_name() -> None:
    _, out = finished()
    done = command("--resume", out, "--edits", 13, "--batch", 2)
    assert done.code == 2
    assert "error: --resume goes on with the stored configuration; it cannot change edits, batch" in done.err


def test_going_on_with_another_model_is_refused_by_name(tmp_path: Path) -> None:
    _, out = finished()
    manifest = json.loads((out / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "model_hash": "another", "checksums": False}))
    done = command("--resume", tmp_path)
    assert done.code == 2
    assert f"model_hash: stored 'another', now '{manifest['model_hash']}'" in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_a_run_goes_on_after_its_model_has_moved(tmp_path: Path) -> None:
    _, out = finished()
    shutil.copytree(out, tmp_path / "run")
    moved = shutil.copytree(folder("llava"), tmp_path / "elsewhere")
    done = command("--resume", tmp_path / "run", "--model", moved, figures=False)
    assert done.code == 0, done.err


def test_a_full_disk_under_the_report_is_reported_and_loses_no_answer(tmp_path: Path) -> None:
    _, out = finished()
    shutil.copytree(out, tmp_path / "run")
    figure = next((tmp_path / "run" / "figures").glob("*.png"))
    figure.unlink()
    figure.symlink_to("/dev/full")
    done = command("--resume", tmp_path / "run")
    assert done.code == 2
    assert "No space left on device" in done.err
    assert "Every answer is stored; make it with python -m analysis" in done.err


def test_a_dry_run_shows_schedule_and_cost_and_writes_nothing(tmp_path: Path) -> None:
    done = run("--dry-run", *SMALL, "--set", "finetune.steps=2", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.err == ""
    assert list(tmp_path.iterdir()) == []
    _, out = finished()
    manifest = json.loads((out / "manifest.json").read_text())
    assert re.search(rf"questions +{manifest['questions']:,} of each editor", done.out)
    kinds = Counter(e["kind"] for e in pq.read_table(out / "events.parquet").to_pylist())
    counts = ", ".join(f"{n} {k}" for k, n in sorted(kinds.items()))
    assert re.search(rf"edits +12 \({counts}\), year 1 to 1\b", done.out)
    for words in ("okedit-yearly", "simulated world 0", "right_after", "noop", "finetune", "report", "peak memory about", "disk about"):
        assert words in done.out, words


def test_the_default_folder_lies_under_runs_and_is_named(tmp_path: Path) -> None:
    done = run("--edits", 2, "--editor", "noop", "--max-new-tokens", 1, "--probe-budget", 1, cwd=tmp_path, figures=False)
    assert done.code == 0, done.err
    (out,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"okedit-yearly-0-[0-9a-f]{8}", out.name)
    assert "report: runs/" in done.out


def test_a_config_file_with_the_command_line_on_top(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {folder('llava')}\nedits: 9\neditor: [noop]\nprobe_budget: 1\nmax-new-tokens: 1\nout: {tmp_path / 'out'}\n")
    done = command("--config", file, "--edits", 2, figures=False)
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "out" / "manifest.json").read_text())["config"]
    assert (config["edits"], config["editor"], config["max_new_tokens"]) == (2, ["noop"], 1)


@pytest.mark.ci
def test_an_edited_model_can_be_saved_and_loaded(tmp_path: Path) -> None:
    from testbed.model.loading import load

    _, out = finished()
    done = command("--resume", out, "--save-model", tmp_path)
    assert done.code == 0, done.err
    assert "noop changes no weights of the model, so there is no edited model to save" in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["finetune"]
    saved, plain = load(str(tmp_path / "finetune"), "cpu"), load(str(folder("llava")), "cpu")
    changed = [n for n, p in saved.model.named_parameters() if not p.equal(plain.parameter(n))]
    assert changed == [plain.down_weight(-1)]
