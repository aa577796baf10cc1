"""Masks, padding and pictures: what a key or a gate reads is the prompt, whichever way a batch is put together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from testbed.core.events import Ask
from testbed.model import encoding as encode
from testbed.model.encoding import answer_ids, collate, image_token, prompt_inputs
from testbed.model.handle import BadModel, ModelHandle
from tests.helpers.models import IMAGE, KINDS, TEXT, Noise, build

PROMPTS = ("who?", "what colour is the ship in the northern harbour?", "who leads the bridge?")
ANSWERS = ("green", "Mara Venn", "two red towers")


def asks(kind: str) -> list[Ask]:
    """Three prompts of other lengths; an image-text model gets text, a square picture and a broad one."""
    pictures = [None, None, None] if kind in TEXT else [None, Noise(1), Noise(2, 32, 64)]
    return [Ask(p, x) for p, x in zip(PROMPTS, pictures)]


def spelled(handle: ModelHandle, some: list[Ask]) -> list[list[int]]:
    return [answer_ids(handle, a, x) for a, x in zip(some, ANSWERS)]


@torch.no_grad()
def answer_logprobs(handle: ModelHandle, batch: encode.Batch) -> torch.Tensor:
    logits = handle.model(**batch.inputs).logits[batch.before_answer]
    return logits.log_softmax(-1).gather(1, batch.answer_ids[:, None])[:, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_left_and_right_padding_agree(kind: str) -> None:
    handle, some = build(kind), asks(kind)
    tails = spelled(handle, some)
    left, right = collate(handle, some, tails, side="left"), collate(handle, some, tails)
    assert torch.equal(left.answer_ids, right.answer_ids)
    torch.testing.assert_close(answer_logprobs(handle, left), answer_logprobs(handle, right), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_masks_part_the_row_into_padding_prompt_and_answer(kind: str, side: encode.Side) -> None:
    handle, some = build(kind), asks(kind)
    tails = spelled(handle, some)
    batch = collate(handle, some, tails, side=side, end=True)
    seen, ids = batch.inputs["attention_mask"].bool(), batch.inputs["input_ids"]
    assert not (batch.prompt & batch.answer).any()
    assert torch.equal(batch.prompt | batch.answer, seen)
    for i, (one, tail) in enumerate(zip(some, tails)):
        own = prompt_inputs(handle, one)["input_ids"][0]
        assert torch.equal(ids[i][batch.prompt[i]], own)
        assert ids[i][batch.answer[i]].tolist() == [*tail, handle.tokenizer.eos_token_id]
        assert batch.last_prompt[i] == batch.prompt[i].nonzero().max()
        assert batch.before_answer[i].sum() == len(tail) + 1
        assert batch.before_answer[i].nonzero().min() == batch.last_prompt[i]
        assert bool(batch.picture[i].any()) == (one.image is not None)
    assert not (batch.picture & ~batch.prompt).any()


@pytest.mark.parametrize("kind", IMAGE)
def test_a_cached_picture_gives_what_the_processor_gives(kind: str) -> None:
    from PIL import Image

    handle = build(kind)
    for prompt in PROMPTS:
        for picture in (Noise(1), Noise(2, 32, 64)):
            got = prompt_inputs(handle, Ask(prompt, picture))
            assert handle.family.image is not None
            text = handle.family.image.format(prompt=prompt)
            want = handle.processor(images=[Image.fromarray(picture.load())], text=[text], return_tensors="pt")  # type: ignore[misc]
            for name, tensor in want.items():
                if name != "attention_mask":
                    torch.testing.assert_close(got[name], tensor, atol=0, rtol=0)
            assert (got["input_ids"] == image_token(handle)).any()


@pytest.mark.parametrize("kind", IMAGE)
def test_a_picture_is_processed_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    handle, calls = build(kind), []
    monkeypatch.setattr(handle, "cache", {})
    process = encode._process
    monkeypatch.setattr(encode, "_process", lambda *args: calls.append(args) or process(*args))
    for prompt in PROMPTS:
        prompt_inputs(handle, Ask(prompt, Noise(5)))
    assert len(calls) == 1


def test_the_room_for_pictures_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = build("llava")
    monkeypatch.setattr(handle, "cache", {})
    monkeypatch.setattr(encode, "_PICTURE_BYTES", 40_000)
    for seed in range(9):
        prompt_inputs(handle, Ask("who?", Noise(seed)))
    kept = handle.cache["pictures"]
    assert list(kept) == [Noise(s).key for s in (6, 7, 8)]
    assert kept.bytes == sum(x.bytes for x in kept.values()) <= 40_000


def test_a_processor_that_rewrites_the_prompt_is_not_cut_up(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = build("llava")
    monkeypatch.setattr(handle, "cache", {})
    full = {"input_ids": torch.tensor([[9, 8, 4, 4, 7]]), "pixel_values": torch.zeros(1, 3, 2, 2)}
    monkeypatch.setattr(encode, "_process", lambda *args: full)
    assert prompt_inputs(handle, Ask("who?", Noise(1))) is full
    assert not handle.cache["pictures"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_follows_its_prompt(kind: str) -> None:
    handle = build(kind)
    some = [Ask(p) for p in PROMPTS]
    for one, answer in zip(some, ANSWERS):
        ids = prompt_inputs(handle, one)["input_ids"][0].tolist() + answer_ids(handle, one, answer)
        whole = handle.family.text.format(prompt=one.prompt) + handle.family.answer.format(answer=answer)
        assert ids == handle.tokenizer(whole)["input_ids"]


def test_a_picture_for_a_text_model_is_refused() -> None:
    with pytest.raises(BadModel, match=r"reads no pictures.*--missing-images"):
        collate(build("gpt2"), [Ask("who?", Noise(0))])


def test_an_answer_of_nothing_is_refused() -> None:
    handle = build("qwen2_vl")
    with pytest.raises(BadModel, match="tokenises to nothing"):
        answer_ids(handle, Ask("who?"), "")


def test_an_answer_of_unknown_words_alone_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"<unk>": 0, "red": 1, "</s>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    handle = replace(build("llama"), tokenizer=tok, cache={})
    assert answer_ids(handle, Ask("who?"), "red ship") == [1, 0]
    with pytest.raises(BadModel, match=r"'ship' tokenises to nothing.*testbed\.pretrain"):
        answer_ids(handle, Ask("who?"), "ship")


@pytest.mark.parametrize("kind", IMAGE)
def test_a_question_that_spells_the_image_token_gets_no_second_picture(kind: str) -> None:
    handle = build(kind)
    token = handle.tokenizer.convert_ids_to_tokens(image_token(handle))
    plain, odd = (collate(handle, [Ask(p, Noise(1))]) for p in ("who?", f"who {token}?"))
    assert odd.picture.sum() == plain.picture.sum() > 0
    assert not collate(handle, [Ask(f"who {token}?")]).picture.any()
