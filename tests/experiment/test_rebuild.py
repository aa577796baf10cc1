"""Editors out of a run folder: the state that was saved, any step before it, and what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from testbed.experiment.config import BadConfig
from testbed.experiment.rebuild import rebuild
from testbed.storage.files import StoreError
from tests.helpers.models import folder
from tests.helpers.small_run import EDITS, small_run


def test_an_editor_comes_back_and_any_step_is_made_again() -> None:
    stored = rebuild(small_run())
    assert stored.n_steps == EDITS
    step, saved = stored.newest("finetune")
    assert step == EDITS
    (name,) = saved.edited_weights()
    again = stored.at("finetune", EDITS)
    assert torch.equal(again.edited_weights()[name], saved.edited_weights()[name])
    early = stored.at("finetune", 2)
    assert not torch.equal(early.edited_weights()[name], saved.edited_weights()[name])
    stored.advance(early, 2, EDITS)
    assert torch.equal(early.edited_weights()[name], saved.edited_weights()[name])


def test_what_a_run_does_not_have_is_reported() -> None:
    stored = rebuild(small_run())
    assert stored.names() == ("noop", "finetune", "balancedit")
    with pytest.raises(BadConfig, match="has no editor 'memit'; it has noop, finetune, balancedit"):
        stored.names(("noop", "memit"))
    with pytest.raises(BadConfig, match="has no editor 'memit'"):
        stored.newest("memit")


def test_another_model_or_data_is_refused_and_moved_ones_are_not(tmp_path: Path) -> None:
    moved = tmp_path / "data"
    moved.mkdir()
    shutil.copy(small_run().parent / "facts.jsonl", moved)
    assert rebuild(small_run(), {"data_root": moved}).n_steps == EDITS
    with pytest.raises(StoreError, match="model_hash: stored"):
        rebuild(small_run(), {"model": str(folder("gpt2", 1))})
    with pytest.raises(StoreError, match="is not a run folder"):
        rebuild(tmp_path)


def test_a_folder_without_answers_of_the_unedited_model_is_reported(tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(small_run(), out)
    (out / "base" / "answers.parquet").unlink()
    assert json.loads((out / "manifest.json").read_text())["benchmarks"]["bench:more"]["items"] == 1
    with pytest.raises(StoreError, match="holds no readable answers: go on with --resume"):
        rebuild(out).context()
