"""A prompt is answered alike alone and beside longer ones; a model for which that does not hold is refused; and end and begin tokens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, GPTNeoConfig

from testbed.core.events import Ask
from testbed.model.encoding import answer_ids, collate, prompt_inputs, text_tokens
from testbed.model.handle import BadModel, ModelHandle
from testbed.model.loading import load, verify_padding
from testbed.model.predictor import ModelPredictor
from tests.helpers.models import KINDS, Noise, build, save

SHORT, LONG = Ask("who leads?"), Ask("what colour is the ship in the northern harbour, after all these years and all those storms?")
GPT_NEO = GPTNeoConfig(
    vocab_size=400,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    attention_types=[[["global", "local", "global"], 1]],
    window_size=8,
    max_position_embeddings=256,
    intermediate_size=96,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
)


def gpt_neo(folder: Path) -> ModelHandle:
    """A family whose positions are learned and counted from the row's start, on which MEND and KE were published."""
    save("gpt2", folder)
    GPT_NEO.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_config(GPT_NEO).save_pretrained(folder)
    return load(str(folder), device="cpu")


def check_alone_and_beside(handle: ModelHandle, short: Ask, long: Ask) -> None:
    predictor = ModelPredictor(handle)
    alone, beside = predictor.score([short], ["green"])[0], predictor.score([short, long], ["green", "red towers"])[0]
    np.testing.assert_allclose(alone.logprobs, beside.logprobs, atol=1e-3)
    texts = [predictor.generate(asks, 4)[0] for asks in ([short], [short, long])]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_score_does_not_depend_on_the_rest_of_the_batch(kind: str) -> None:
    check_alone_and_beside(build(kind), SHORT, LONG)
    if build(kind).reads_pictures:
        check_alone_and_beside(build(kind), Ask(SHORT.prompt, Noise(1)), Ask(LONG.prompt, Noise(2)))


def test_positions_are_given_wherever_a_forward_takes_them(tmp_path: Path) -> None:
    handle = gpt_neo(tmp_path)
    check_alone_and_beside(handle, SHORT, LONG)
    handle.__dict__["takes_position_ids"] = False
    with pytest.raises(BadModel, match=r"depend on padding: beside a longer prompt, padded on the left, .* differ by up to"):
        verify_padding(handle)


def test_nothing_is_refused_for_logits_that_are_not_finite() -> None:
    handle = build("llama")
    name = handle.down_weight(0)
    with handle.swapped({name: torch.full_like(handle.parameter(name), torch.nan)}):
        assert verify_padding(handle) is None
        assert np.isnan(ModelPredictor(handle).score([SHORT], ["green"])[0].logprobs).all()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "llava"])
@pytest.mark.parametrize("sides", ["left", "right", "both"])
def test_keys_and_hidden_states_do_not_depend_on_padding(kind: str, sides: str) -> None:
    handle = build(kind)
    seen: list[torch.Tensor] = []
    batches = [collate(handle, [SHORT])]
    end = int(batches[0].prompt.sum()) - 1
    batches.append(collate(handle, [SHORT, LONG], at=[end, end + 4]) if sides == "both" else collate(handle, [SHORT, LONG], side=sides))  # type: ignore[arg-type]
    for batch in batches:
        with torch.no_grad(), handle.hooked(handle.down(-1), lambda m, args: seen.append(args[0]), pre=True):
            handle.model(**batch.inputs, use_cache=False)
    keys = [act.reshape(*b.prompt.shape, -1)[0][b.prompt[0]] for act, b in zip(seen, batches)]
    torch.testing.assert_close(keys[0], keys[1], rtol=1e-3, atol=1e-3)


def appending(folder: Path) -> None:
    """Let the tokenizer in a folder append its end token to every text, as T5's and some LLaMA conversions do."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)])
    tokenizer.save_pretrained(folder)


def test_an_end_token_that_the_tokenizer_appends_is_taken_off_prompts_and_texts(tmp_path: Path) -> None:
    save("gpt2", tmp_path)
    plain = load(str(tmp_path), device="cpu")
    appending(tmp_path)
    handle = load(str(tmp_path), device="cpu")
    assert handle.appends_end and not plain.appends_end
    for ask in (SHORT, LONG):
        assert prompt_inputs(handle, ask)["input_ids"].tolist() == prompt_inputs(plain, ask)["input_ids"].tolist()
        assert answer_ids(handle, ask, "green") == answer_ids(plain, ask, "green")
    assert text_tokens(handle, "the old bridge") == text_tokens(plain, "the old bridge")
    scores = [ModelPredictor(h).score([SHORT], ["green"])[0].logprobs for h in (plain, handle)]
    assert np.array_equal(*scores)


@pytest.mark.parametrize(("kind", "begins"), [("gpt2", False), ("llama", True)])
def test_running_text_begins_with_a_begin_token_only_where_the_tokenizer_adds_one(kind: str, begins: bool) -> None:
    handle: Any = build(kind)
    assert handle.tokenizer.bos_token_id is not None
    ids = text_tokens(handle, "the old bridge")
    assert (ids[0] == handle.tokenizer.bos_token_id) == begins
    assert len(ModelPredictor(handle).text_logprobs(["the old bridge"])[0]) == len(ids) - 1


def test_running_text_is_cut_to_the_window() -> None:
    handle = build("gpt2")
    short: Any = SimpleNamespace(tokenizer=handle.tokenizer, window=3, appends_end=False)
    assert text_tokens(short, "the old bridge over the river") == text_tokens(handle, "the old bridge over the river")[:3]


def test_a_padding_token_beyond_the_embedding_gives_way_to_the_end_token(tmp_path: Path) -> None:
    save("llama", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "<far away>"})
    tokenizer.save_pretrained(tmp_path)
    handle = load(str(tmp_path), device="cpu")
    if tokenizer.pad_token_id < 400:
        pytest.fail("the test's own padding token lies within the embedding")
    assert handle.tokenizer.pad_token_id == handle.tokenizer.eos_token_id
    assert any("lies beyond the model's embedding" in note for note in handle.notes)
    check_alone_and_beside(handle, SHORT, LONG)
