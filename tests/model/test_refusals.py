"""Models that cannot be used are refused with the true reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, T5Config

from testbed.model.handle import BadModel
from testbed.model.loading import load
from tests.helpers.models import save


def test_an_adapter_is_to_be_merged(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BadModel, match=r"is an adapter, not a model: merge it with its base model \(PeftModel.*merge_and_unload"):
        load(str(tmp_path), device="cpu")


def test_an_encoder_decoder_is_called_one(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(BadModel, match=r"\(t5\) is an encoder-decoder; the testbed edits decoder-only models"):
        load(str(tmp_path), device="cpu")


def test_an_image_text_type_that_is_not_in_the_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "pixtral_none", "auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(BadModel, match="needs code that comes with it, and the testbed runs no such code"):
        load(str(tmp_path), device="cpu")
    for kind in ("fuyu", "mllama"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(BadModel, match=rf"reads pictures, and its type '{kind}' is not in the table of families.*there are blip-2"):
            load(str(tmp_path), device="cpu")


def test_weights_that_are_not_finite_name_the_parameter(tmp_path: Path) -> None:
    save("llama", tmp_path)
    model: Any = LlamaForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(BadModel, match=r"not finite in model\.layers\.1\.mlp\.down_proj\.weight"):
        load(str(tmp_path), device="cpu")


def test_a_tokenizer_of_another_model_is_refused_and_added_tokens_are_not(tmp_path: Path) -> None:
    save("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens(["<unused>"])
    tokenizer.save_pretrained(tmp_path)
    load(str(tmp_path), device="cpu")
    model: Any = LlamaForCausalLM.from_pretrained(tmp_path)
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path)
    with pytest.raises(BadModel, match=r"has 100 tokens beyond the 300 rows of the model's embedding"):
        load(str(tmp_path), device="cpu")
