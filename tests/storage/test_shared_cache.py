"""What runs share is computed once, is what each would have computed itself, and is never taken for something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest
import torch

from streams.base import TrainPool
from testbed.editors.locate import second_moments as moments_module
from testbed.editors.locate.general_text import corpus_of
from testbed.experiment import runner
from testbed.experiment.config import RunConfig
from testbed.model.loading import load
from testbed.storage.files import StoreError
from testbed.storage.shared_cache import base_answers, exclusive
from tests.helpers.models import build, folder


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    (tmp_path / "facts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Who owns ship {i}?", "target": f"Ann {i}"}) + "\n" for i in range(9))
    )
    return tmp_path


def run(root: Path, name: str, **more: Any) -> Path:
    asked = {"edits": 3, "probe_budget": 20, "max_new_tokens": 2, "device": "cpu", "editor": ("noop",), **more}
    config = RunConfig("jsonl:facts.jsonl", model=str(folder("gpt2")), data_root=root, out=root / name, **asked)
    with patch.object(runner, "finish", lambda out: {}):
        runner.study(config)
    return root / name


def unasked(*_: Any) -> Any:
    raise AssertionError("the unedited model was asked again")


def test_a_second_run_takes_the_answers_of_the_first(facts: Path) -> None:
    plain, first = run(facts, "plain"), run(facts, "first", cache=facts / "cache")
    with patch.object(runner, "answer_base", unasked):
        second = run(facts, "second", cache=facts / "cache", editor=("finetune",), set=("finetune.steps=1",))
    tables = [pq.read_table(out / "base" / "answers.parquet") for out in (plain, first, second)]
    assert tables[0].num_rows
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
    manifests = [json.loads((out / "manifest.json").read_text()) for out in (plain, first)]
    assert manifests[0]["run"] == manifests[1]["run"]


def test_other_questions_lengths_and_models_are_kept_apart(facts: Path) -> None:
    cache = facts / "cache"
    run(facts, "first", cache=cache)
    for n, other in enumerate([{"seed": 1}, {"max_new_tokens": 3}, {"dtype": "float64"}], 2):
        run(facts, str(n), cache=cache, **other)
        assert len(list(cache.glob("unedited-*"))) == n
    handles = build("gpt2", 0), build("gpt2", 1)
    asked = [base_answers(cache, h, [], 2, lambda: []) for h in handles]
    assert asked == [[], []]
    assert len(list(cache.glob(".unedited-*.lock"))) == 6


def test_a_damaged_file_is_made_again(facts: Path) -> None:
    first = run(facts, "first", cache=facts / "cache")
    (stored,) = (facts / "cache").glob("unedited-*/base/answers.parquet")
    stored.write_bytes(stored.read_bytes()[:200])
    second = run(facts, "second", cache=facts / "cache")
    assert pq.read_table(stored).equals(pq.read_table(first / "base" / "answers.parquet"))
    assert pq.read_table(second / "base" / "answers.parquet").equals(pq.read_table(stored))


def test_second_moments_are_computed_once_and_alike(tmp_path: Path) -> None:
    """The folder gives each run what it would have made, whichever layers were read together."""
    corpus = corpus_of(load(str(folder("gpt2")), "cpu"), TrainPool(texts=("the small lamp stands beside the river",) * 40), None)
    plain = moments_module.second_moments(load(str(folder("gpt2")), "cpu"), corpus, [0, 1])
    handles = [load(str(folder("gpt2")), "cpu") for _ in range(3)]
    for h in handles:
        h.cache_folder = tmp_path
    made = moments_module.second_moments(handles[0], corpus, [0, 1])
    with patch.object(moments_module, "_collect", unasked):
        again = moments_module.second_moments(handles[1], corpus, [0, 1])
    for n in (0, 1):
        assert torch.equal(plain[n], made[n])
        assert torch.equal(plain[n], again[n])
        one = moments_module.second_moments(handles[2], corpus, [1])
    assert torch.equal(one[1], plain[1])
    assert len(list((tmp_path / "second-moments").glob("second-moment-*.safetensors"))) == 2


def test_one_at_a_time(tmp_path: Path) -> None:
    from filelock import FileLock, Timeout

    with exclusive(tmp_path / "thing"), pytest.raises(Timeout):
        FileLock(tmp_path / ".thing.lock", timeout=0).acquire()
    with FileLock(tmp_path / ".thing.lock", timeout=0) as lock:
        assert lock.is_locked


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"cannot be written: .*choose another --cache"), exclusive(tmp_path / "file" / "x"):
        pass
