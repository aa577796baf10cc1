"""The sweep and settings files behind the results in the documents."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from testbed.experiment.config import RunConfig, setting_owner
from testbed.sweeps.grid import expand

FILES = sorted((Path(__file__).parents[2] / "docs" / "results").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_the_files_behind_the_results_can_be_read(path: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(path.read_text("utf-8"))
    if "editor" not in values:  # settings of editors, for --config
        owners = {setting_owner(s) for s in values["set"]}
        assert RunConfig(editor=tuple(owners), set=tuple(values["set"]), stream="countries-yearly").problems() == []
        return
    values["data_root"] = tmp_path if "data_root" in values else None
    grid = expand(values, tmp_path / "out")
    seeds = values["seed"] if isinstance(values["seed"], list) else [values["seed"]]
    assert len(grid.cells) == len(values["editor"]) * len(seeds)
    assert list(grid.comparisons) == [""]
