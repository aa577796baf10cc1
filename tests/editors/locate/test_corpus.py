"""General text for second moments: files, datasets, statistics kept on disk, progress."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from streams.base import TrainPool
from testbed.core.events import EditBatch
from testbed.editors.base import BadEditor
from testbed.editors.locate import second_moments as moments_module
from testbed.editors.locate.second_moments import corpus_of, second_moments
from testbed.model import progress
from tests.helpers.facts import FACTS, POOL, TEXTS, make
from tests.helpers.models import build


def test_a_file_and_a_dataset_of_the_same_lines_are_one_corpus(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS) + "\n\n")
    datasets.Dataset.from_dict({"text": [*TEXTS, " "], "body": ["x"] * (len(TEXTS) + 1)}).save_to_disk(tmp_path / "set")
    file, named = corpus_of(POOL, str(tmp_path / "lines.txt")), corpus_of(POOL, f"hub:{tmp_path / 'set'}")
    assert file.texts == named.texts == TEXTS
    assert file.hash == named.hash != corpus_of(POOL, None).hash
    assert corpus_of(POOL, f"hub:{tmp_path / 'set'}:::body").texts[0] == "x"
    with pytest.raises(BadEditor, match="no field 'words'; there are text, body"):
        corpus_of(POOL, f"hub:{tmp_path / 'set'}:::words")
    with pytest.raises(BadEditor, match=r"split train\) cannot be loaded"):
        corpus_of(POOL, f"hub:{tmp_path / 'nothing'}")


def test_an_editor_takes_its_corpus_by_name(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": list(TEXTS[:5])}).save_to_disk(tmp_path / "set")
    own = make("memit", pool=TrainPool(), corpus=f"hub:{tmp_path / 'set'}")
    other = make("memit", pool=TrainPool(texts=TEXTS[:5]))
    for editor in (own, other):
        assert not editor.apply(EditBatch((FACTS[0],), 1)).failed
    assert all(torch.equal(w, other.edited_weights()[n]) for n, w in own.edited_weights().items())


def test_statistics_on_disk_are_used_for_their_model_text_and_layer_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, corpus = replace(build("llama"), cache={}), corpus_of(TrainPool(texts=TEXTS[:7]), None)
    first = second_moments(handle, corpus, [0, 1], tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    collected: list[Any] = []
    collect = moments_module._collect
    monkeypatch.setattr(moments_module, "_collect", lambda *a: (collected.append(a[2]), collect(*a))[1])
    again = second_moments(replace(build("llama"), cache={}), corpus, [0, 1], tmp_path)
    assert collected == []
    assert all(torch.equal(again[n], first[n]) for n in first)
    second_moments(replace(build("llama", 1), cache={}), corpus, [0], tmp_path)
    second_moments(replace(build("llama"), cache={}), corpus_of(POOL, None), [0], tmp_path)
    second_moments(replace(build("llama"), cache={}), corpus, [0, 1, 2], tmp_path)
    assert collected == [[0], [0], [2]]
    broken = next(tmp_path.glob(f"moments-{handle.hash}-{corpus.hash}-0*"))
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(BadEditor, match="remove the file"):
        second_moments(replace(build("llama"), cache={}), corpus, [0], tmp_path)


def test_the_pass_stops_when_the_moments_have_settled_and_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, int]] = []
    monkeypatch.setattr(progress.Bars, "advance", lambda self, name, done, total, success=None: shown.append((done, total)))
    handle = replace(build("llama"), cache={})
    second_moments(handle, corpus_of(TrainPool(texts=TEXTS[:3] * 1000), None), [0])
    assert shown[0] == (1, 94)
    assert shown[-1] == (94, 94)
    assert len(shown) < 60
    few = len(shown)
    second_moments(handle, corpus_of(TrainPool(texts=TEXTS), None), [0])
    assert shown[few:] == [(1, 2), (2, 2)]


def test_bars_inside_bars_are_one_display() -> None:
    with progress.bars() as outer, progress.bars() as inner:
        assert inner is outer
    with progress.bars() as fresh:
        assert fresh is not outer
