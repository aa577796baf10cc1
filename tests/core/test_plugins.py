"""Plug-ins from outside the package: killed, resumed, asked, measured, and refused where they changed."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from testbed.__main__ import main
from testbed.core.plugins import BadPlugin, installed_plugins, load_plugins, refuse_changed
from testbed.core.registry import EDITORS
from testbed.sweeps.grid import expand
from tests.helpers.models import folder
from tests.helpers.warm_process import command

ROOT = Path(__file__).parents[2]
TEMPLATE = (ROOT / "docs" / "templates" / "editor.py").read_text("utf-8")
SMALL = ["--stream", "world-yearly", "--edits", 6, "--batch", 2, "--probe-budget", 60, "--save-every", 2, "--device", "cpu"]


def rows(out: Path) -> list[dict[str, Any]]:
    """The answers of the plug-in's editor, without their times."""
    found = [r for p in sorted((out / "my-edit" / "records").glob("*.parquet")) for r in pq.read_table(p).to_pylist()]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in found]


def test_an_editor_of_ones_own_file_is_killed_resumed_and_asked(tmp_path: Path) -> None:
    mine, out = tmp_path / "mine.py", tmp_path / "out"
    mine.write_text(TEMPLATE.replace('"sgd-edit"', '"my-edit"'))
    words = ["--model", folder("llava"), "--plugin", "mine.py", "--editor", "noop,my-edit", *SMALL]
    killed = command(*words, "--out", "out", kill="apply 3 again", figures=False, cwd=tmp_path)  # of the second editor
    assert killed.code == -signal.SIGKILL and rows(out), killed.err
    manifest = json.loads((out / "manifest.json").read_text())
    assert f"plugin mine.py: SHA-256 {manifest['plugins'][0][:12]}..." in manifest["notes"]
    assert manifest["config"]["plugin"] == ["mine.py"] and len(manifest["plugins"][0]) == 64
    again = command("--resume", "out", figures=False, cwd=tmp_path)
    assert again.code == 0, again.err
    whole = command(*words, "--out", "whole", figures=False, cwd=tmp_path)
    assert whole.code == 0, whole.err
    assert rows(out) == rows(tmp_path / "whole")
    assert "my-edit" in json.loads((out / "summary.json").read_text())["editors"]
    asked = command("out", "What is 2 plus 3?", "--editor", "my-edit", name="ask", cwd=tmp_path)
    assert asked.code == 0 and "my-edit" in asked.out, asked.err
    alone = command("out", "--editor", "my-edit", "--alone", "1", name="bisect", cwd=tmp_path)
    assert alone.code == 0 and len(json.loads((out / "my-edit" / "alone-perplexity.json").read_text())["values"]) == 1, alone.err
    mine.write_text(mine.read_text() + "\nfrom pathlib import Path\nPath('ran').touch()\n")
    refused = command("--resume", "out", cwd=tmp_path)
    assert refused.code == 2 and "changed since the run began" in refused.err and "Traceback" not in refused.err
    assert not (tmp_path / "ran").exists()  # nothing of a changed file is run
    mine.rename(tmp_path / "moved.py")
    gone = command("--resume", "out", cwd=tmp_path)
    assert gone.code == 2 and "there is no such file" in gone.err


def test_the_bench_measures_an_editor_of_ones_own_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, found = tmp_path / "mine.py", tmp_path / "found.json"
    mine.write_text(TEMPLATE.replace('"sgd-edit"', '"edit-of-the-bench"'))
    sizes = ["--stream", "world-yearly", "--edits", "1", "--plain", "0", "--questions", "2", "--device", "cpu", "--out", str(found)]
    words = ["bench", "--plugin", str(mine), "--editor", "edit-of-the-bench[steps=2]", "--model", str(folder("llava")), *sizes]
    try:
        assert main(words) == 0
        (row,) = json.loads(found.read_text())["editors"]
        assert (row["editor"], row["edits"], row["failed"]) == ("edit-of-the-bench[steps=2]", 1, 0)
    finally:
        EDITORS._entries.pop("edit-of-the-bench", None)
    mine.unlink()
    capsys.readouterr()
    assert main(words) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_the_cells_of_a_sweep_carry_the_file(tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(TEMPLATE.replace('"sgd-edit"', '"edit-of-a-sweep"'))
    try:
        cells = expand({"plugin": str(mine), "editor": ["noop", "edit-of-a-sweep"]}, tmp_path / "sweep").cells.values()
        assert [c.config.plugin for c in cells] == [(str(mine),)] * 2
        assert {name for c in cells for name in c.config.editor} == {"noop", "edit-of-a-sweep"}
    finally:
        EDITORS._entries.pop("edit-of-a-sweep", None)


def install(folder: Path, points: str) -> None:
    """A distribution with these entry points, in place of the one before it."""
    about = folder / "somebodys_editors-1.0.dist-info"
    shutil.rmtree(about, ignore_errors=True)
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: somebodys-editors\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(points)


def test_an_installed_package_offers_its_editors_to_every_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "somebodys_editors.py").write_text(TEMPLATE.replace('"sgd-edit"', '"edit-of-somebody"'))
    install(tmp_path, "[testbed.plugins]\nmine = somebodys_editors\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        assert load_plugins([]) == {}
        assert "edit-of-somebody" in EDITORS.names()
        assert len(load_plugins(["somebodys_editors"])["somebodys_editors"]) == 64  # the same module by its name
        began = installed_plugins()
        assert began == {"the entry point mine of somebodys-editors": load_plugins(["somebodys_editors"])["somebodys_editors"]}
        refuse_changed([], [], began)
        (tmp_path / "somebodys_editors.py").write_text(TEMPLATE + "\n")
        with pytest.raises(BadPlugin, match="the entry point mine of somebodys-editors changed since the run began: install the version"):
            refuse_changed([], [], began)
        install(tmp_path, "")
        with pytest.raises(BadPlugin, match="of somebodys-editors is not installed any more"):
            refuse_changed([], [], began)
        install(tmp_path, "[testbed.plugins]\nmine = nowhere_at_all\n")
        with pytest.raises(BadPlugin, match="the entry point mine of somebodys-editors cannot be loaded: ModuleNotFoundError"):
            load_plugins([])
    finally:
        EDITORS._entries.pop("edit-of-somebody", None)
        sys.modules.pop("somebodys_editors", None)


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    broken, empty = tmp_path / "broken.py", tmp_path / "empty.py"
    broken.write_text("import nowhere_at_all\n")
    empty.write_text("x = 1\n")
    with pytest.raises(BadPlugin, match=r"broken\.py cannot be loaded: ModuleNotFoundError"):
        load_plugins([str(broken)])
    with pytest.raises(BadPlugin, match="registers nothing"):
        load_plugins([str(empty)])
    with pytest.raises(BadPlugin, match="there is no such file"):
        load_plugins([str(tmp_path / "absent.py")])
    with pytest.raises(BadPlugin, match="a file is given by its path"):
        load_plugins(["no.such.module"])


def test_a_name_that_is_taken_and_a_file_that_changed_are_refused(tmp_path: Path) -> None:
    taken, mine = tmp_path / "taken.py", tmp_path / "mine.py"
    taken.write_text(TEMPLATE.replace('"sgd-edit"', '"noop"'))
    with pytest.raises(BadPlugin, match=r"registered by .* and again by"):
        load_plugins([str(taken)])
    mine.write_text(TEMPLATE.replace('"sgd-edit"', '"edit-of-a-test"'))
    try:
        assert load_plugins([str(mine)]) == load_plugins([str(mine)])
        mine.write_text(mine.read_text() + "\n")
        with pytest.raises(BadPlugin, match="changed since this process loaded it"):
            load_plugins([str(mine)])
    finally:
        EDITORS._entries.pop("edit-of-a-test")
