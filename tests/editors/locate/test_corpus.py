"""General text for second moments: where it comes from, how it is read, statistics kept on disk and imported, what is said."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streams.base import TrainPool
from testbed.core.events import EditBatch, Question
from testbed.editors.base import BadEditor
from testbed.editors.locate import general_text
from testbed.editors.locate import second_moments as moments_module
from testbed.editors.locate.core import LocateConfig
from testbed.editors.locate.general_text import blocks, corpus_of
from testbed.editors.locate.second_moments import second_moments
from testbed.experiment.config import RunConfig
from testbed.model import progress
from testbed.model.handle import ModelHandle
from tests.helpers.facts import FACTS, POOL, TEXTS, make
from tests.helpers.models import Noise, build

QUESTIONS = TrainPool((Question("general", "what colour is the lamp?", "red", topic="x"),))
WIDTH = 96


def fresh(kind: str = "llama", seed: int = 0, **more: Any) -> ModelHandle:
    return replace(build(kind, seed), cache={}, **more)


def read(pool: TrainPool, named: str | None = None, root: Path | None = None) -> Any:
    return corpus_of(fresh(data_root=root), pool, named)


def texts_of(corpus: Any) -> list[list[int]]:
    return sorted(corpus.sequences(build("llama")))


def test_a_file_and_a_dataset_of_the_same_lines_are_one_corpus(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("\n".join(TEXTS) + "\n\n = A heading = \n")
    datasets.Dataset.from_dict({"text": [*TEXTS, " "], "body": ["x"] * (len(TEXTS) + 1)}).save_to_disk(tmp_path / "set")
    file, named = read(POOL, str(tmp_path / "lines.txt")), read(POOL, f"hub:{tmp_path / 'set'}")
    assert texts_of(file) == texts_of(named)
    assert len(texts_of(file)) == len(TEXTS)
    assert file.hash == named.hash != read(POOL).hash
    assert len(texts_of(read(POOL, f"hub:{tmp_path / 'set'}:::body"))[0]) < 4
    with pytest.raises(BadEditor, match="no field 'words'; there are text, body"):
        read(POOL, f"hub:{tmp_path / 'set'}:::words")
    with pytest.raises(BadEditor, match=r"split train\) cannot be loaded"):
        read(POOL, f"hub:{tmp_path / 'nothing'}")


def test_a_dataset_is_sampled_and_not_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(general_text, "_DOCUMENTS", 20)
    datasets.Dataset.from_dict({"text": [f"text number {i:03}" for i in range(200)]}).save_to_disk(tmp_path / "set")
    found = general_text._dataset(str(tmp_path / "set"))
    assert len(set(found)) == 20
    assert max(found) > "text number 150"
    assert found == general_text._dataset(str(tmp_path / "set"))


def test_text_is_read_in_another_order_than_it_is_kept() -> None:
    corpus, handle = read(TrainPool(texts=TEXTS)), build("llama")
    order = list(corpus.sequences(handle))
    assert sorted(order) == sorted(handle.tokenizer(t)["input_ids"] for t in TEXTS)
    assert order != [handle.tokenizer(t)["input_ids"] for t in TEXTS]
    assert order == list(read(TrainPool(texts=TEXTS)).sequences(handle))


def test_the_default_is_the_streams_running_text_then_wikitext_then_what_the_model_writes(tmp_path: Path) -> None:
    assert read(POOL, root=tmp_path).source == "the stream's train pool"
    pictured = TrainPool((replace(QUESTIONS.questions[0], image=Noise(1)),))
    assert read(pictured, root=tmp_path).asks
    written = read(QUESTIONS, root=tmp_path)
    assert "the model wrote itself" in written.source
    deep = tmp_path / "benchmarks" / "wikitext-2"
    deep.mkdir(parents=True)
    (deep / "test.txt").write_text("never read")
    assert read(QUESTIONS, root=tmp_path).source == written.source
    (deep / "valid.txt").write_text(" = Title = \n \n" + "\n".join(TEXTS))
    assert read(QUESTIONS, root=tmp_path).source == f"WikiText ({deep / 'valid.txt'})"
    (deep / "train.txt").write_text("\n".join(TEXTS[:3]))
    assert len(texts_of(read(QUESTIONS, root=tmp_path))) == 3


def test_wikitext_under_the_data_root(data_root: Path) -> None:
    corpus = read(QUESTIONS, root=data_root)
    assert corpus.source.startswith("WikiText (")
    assert sum(len(ids) for ids, _ in zip(corpus.sequences(build("gpt2")), range(200))) > 10_000


@pytest.mark.parametrize(("kind", "begins"), [("llama", True), ("gpt2", False)])
def test_what_the_model_writes_is_the_same_each_time_and_begins_as_its_tokenizer_does(kind: str, begins: bool) -> None:
    handle = fresh(kind)
    corpus = corpus_of(handle, TrainPool(), None)
    state = torch.get_rng_state()
    first, again = ([ids for ids, _ in zip(corpus.sequences(handle), range(20))] for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert first == again
    assert len(set(map(tuple, first))) == 20
    assert all((ids[:1] == [handle.tokenizer.bos_token_id]) == begins for ids in first if ids)
    assert not any(handle.tokenizer.eos_token_id in ids for ids in first)


@pytest.mark.ci
def test_an_editor_without_any_text_learns_from_what_the_model_writes_and_says_so() -> None:
    editor = make("memit", pool=TrainPool())
    assert not editor.apply(EditBatch((FACTS[0],), 1)).failed
    (line,) = [n for n in editor.notes if n.startswith("second moments")]
    assert "text that the model wrote itself" in line
    assert "ended at 10 tokens a key dimension" in line
    assert "uncertain" not in line


@given(st.lists(st.integers(0, 30), max_size=40), st.integers(1, 60), st.integers(1, 9))
def test_batches_hold_every_text_once_within_the_budget(lengths: list[int], tokens: int, block: int) -> None:
    texts = [[i] * n for i, n in enumerate(lengths)]
    made = list(blocks(iter(texts), tokens, block))
    assert sorted(ids for batch in made for ids in batch) == sorted(filter(None, texts))
    assert all(len(batch) == 1 or len(batch) * max(map(len, batch)) <= tokens for batch in made)


def test_an_editor_takes_its_corpus_by_name(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": list(TEXTS)}).save_to_disk(tmp_path / "set")
    own = make("memit", pool=TrainPool(), corpus=f"hub:{tmp_path / 'set'}")
    other = make("memit", pool=TrainPool(texts=TEXTS))
    for editor in (own, other):
        assert not editor.apply(EditBatch((FACTS[0],), 1)).failed
    assert all(torch.equal(w, other.edited_weights()[n]) for n, w in own.edited_weights().items())


def test_a_wrong_corpus_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(bytes(range(256)))
    for path, words in ((tmp_path / "absent.txt", "No such file"), (tmp_path / "picture.png", "cannot be read as text")):
        (problem,) = LocateConfig(corpus=str(path)).problems()
        assert str(path) in problem
        assert words in problem
        config = RunConfig(editor=("memit",), set=(f"memit.corpus={path}",))
        assert any(str(path) in p for p in config.problems())
    (tmp_path / "lines.txt").write_text("a line")
    assert LocateConfig(corpus=str(tmp_path / "lines.txt")).problems() == []


def plain(handle: ModelHandle, texts: tuple[str, ...], layer: int) -> torch.Tensor:
    """C by one text at a time through the whole model."""
    total, count = torch.zeros(WIDTH, WIDTH, dtype=torch.float64), 0
    for text in texts:
        kept: list[torch.Tensor] = []
        ids = torch.tensor([handle.tokenizer(text)["input_ids"]])
        with torch.no_grad(), handle.hooked(handle.down(layer), lambda m, args, kept=kept: kept.append(args[0]), pre=True):
            handle.model(input_ids=ids, use_cache=False)
        keys = kept[0].reshape(-1, WIDTH).double()
        total, count = total + keys.T @ keys, count + len(keys)
    return total / count


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_c_is_that_of_one_text_at_a_time_through_the_whole_model(kind: str) -> None:
    texts = tuple(t[: 20 + 3 * i] for i, t in enumerate(TEXTS))
    found = second_moments(fresh(kind), read(TrainPool(texts=texts)), [0, 1])
    for layer, c in found.items():
        torch.testing.assert_close(c, plain(build(kind), texts, layer), atol=1e-6, rtol=1e-5)


def test_nothing_is_run_behind_the_last_layer_that_is_read() -> None:
    handle, ran = fresh(), []
    with (
        handle.hooked(handle.layers[1], lambda m, args, out: ran.append(1)),
        handle.hooked(handle.layers[2], lambda m, args, out: ran.append(2)),
        handle.hooked(handle.head, lambda m, args, out: ran.append(3)),
    ):
        second_moments(handle, read(TrainPool(texts=TEXTS)), [0, 1])
    assert ran == []


def test_a_layers_statistics_do_not_depend_on_which_others_are_read_with_it() -> None:
    corpus = read(TrainPool(texts=tuple(f"{t} {i}" for i, t in enumerate(TEXTS * 20))))
    together = second_moments(fresh(), corpus, [0, 1, 2])
    for n in together:
        assert torch.equal(second_moments(fresh(), corpus, [n])[n], together[n])


def test_statistics_on_disk_are_used_for_their_model_text_and_layer_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = read(TrainPool(texts=TEXTS[:30]))
    first = second_moments(fresh(), corpus, [0, 1], tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    collected: list[Any] = []
    collect = moments_module._collect
    monkeypatch.setattr(moments_module, "_collect", lambda *a: (collected.append(a[2]), collect(*a))[1])
    notes: list[str] = []
    again = second_moments(fresh(), corpus, [0, 1], tmp_path, notes)
    assert collected == []
    assert "; kept from before. Under 10 tokens a key dimension" in notes[0]
    assert all(torch.equal(again[n], first[n]) for n in first)
    second_moments(fresh(seed=1), corpus, [0], tmp_path)
    second_moments(fresh(), read(POOL), [0], tmp_path)
    second_moments(fresh(), corpus, [0, 1, 2], tmp_path)
    assert collected == [[0], [0], [2]]
    broken = next(tmp_path.glob(f"second-moment-{build('llama').hash}-{corpus.hash}-0*"))
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(BadEditor, match="remove the file"):
        second_moments(fresh(), corpus, [0], tmp_path)


def test_rome_finds_what_memit_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama").cache.pop("second moments", None)  # of other tests
    make("memit", layers=(0, 1), moments=tmp_path).apply(EditBatch((FACTS[0],), 1))
    monkeypatch.setattr(moments_module, "_collect", lambda *a: pytest.fail("computed again"))
    build("llama").cache.pop("second moments")
    rome = make("rome", layer=1, moments=tmp_path)
    assert not rome.apply(EditBatch((FACTS[0],), 1)).failed


def test_published_statistics_are_imported_and_checked(tmp_path: Path) -> None:
    handle, name = fresh(), "model.layers.1.mlp.down_proj_float32_mom2_100000.npz"
    total = np.cov(np.random.default_rng(0).standard_normal((WIDTH, 400))).astype(np.float32) * 5_000
    np.savez(tmp_path / name, **{"mom2.constructor": "x", "mom2.count": 5_000, "mom2.mom2": total, "sample_size": 100})
    notes: list[str] = []
    c = second_moments(handle, read(POOL), [1], tmp_path, notes)[1]
    torch.testing.assert_close(c, torch.from_numpy(total).double() / 5_000)
    assert f"published statistics ({name})" in notes[0]
    np.savez(tmp_path / name, **{"mom2.count": 5_000, "mom2.mom2": total[:5]})
    with pytest.raises(BadEditor, match=r"holds \(5, 96\) numbers .* 96 wide"):
        second_moments(fresh(), read(POOL), [1], tmp_path)
    np.savez(tmp_path / name, **{"mean": total})
    with pytest.raises(BadEditor, match=r"mom2\.mom2 and mom2\.count"):
        second_moments(fresh(), read(POOL), [1], tmp_path)


def test_too_little_text_is_refused_and_little_is_warned_of() -> None:
    with pytest.raises(BadEditor, match=r"[01]\.\d+ a key dimension \(width 96\), rank \d+; .*Fewer than 2 tokens"):
        second_moments(fresh(), read(TrainPool(texts=TEXTS[:5])), [0])
    notes: list[str] = []
    second_moments(fresh(), read(TrainPool(texts=TEXTS)), [0], notes=notes)
    assert "Under 10 tokens a key dimension C is uncertain" in notes[0]
    second_moments(fresh(), read(TrainPool(texts=TEXTS * 10)), [0], notes=notes)
    assert "uncertain" not in notes[1]
    assert "width 96" in notes[1]


def test_the_pass_stops_when_c_has_settled_and_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[int, int]] = []
    monkeypatch.setattr(progress.Bars, "advance", lambda self, name, done, total, success=None: shown.append((done, total)))
    monkeypatch.setattr(moments_module, "_TOKENS", 400)
    notes: list[str] = []
    second_moments(fresh(), read(TrainPool(texts=TEXTS[:1] * 3000)), [0], notes=notes)
    assert "settled within 2%" in notes[0]
    assert shown[-1] == (100, 100)
    assert len(shown) < 100
    tokens = int(notes[0].split(" tokens")[0].split()[-1].replace(",", ""))
    assert 20 * WIDTH <= tokens < 25 * WIDTH
    second_moments(fresh(), read(TrainPool(texts=tuple(f"{t} {i * 7919}" for i, t in enumerate(TEXTS * 25)))), [0], notes=notes)
    assert "ended at 20 tokens a key dimension" in notes[1]
    assert math.isclose(float(notes[0].split(" a key dimension")[0].split()[-1]), tokens / WIDTH, rel_tol=0.01)


def test_bars_inside_bars_are_one_display() -> None:
    with progress.bars() as outer, progress.bars() as inner:
        assert inner is outer
    with progress.bars() as fresh_one:
        assert fresh_one is not outer


def test_lines_of_a_minute_go_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    lines: list[str] = []
    with progress.bars(lines.append), progress.bars() as shown:
        shown.advance("grace", 3, 10)
    assert [line.split(",")[0] for line in lines] == ["grace: 3 of 10"]
    assert capsys.readouterr().err == ""
