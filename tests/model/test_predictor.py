"""One model, asked in batches or one by one, scored or left to speak: the answers are the same, and it is left untouched."""

from __future__ import annotations

import random
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.core.events import Ask
from testbed.core.grading import natural_stop
from testbed.model.encoding import answer_ids, collate
from testbed.model.generation import FIRST_IDS, FirstLine, Score
from testbed.model.handle import weights_hash
from testbed.model.predictor import ModelPredictor, Response
from tests.helpers.models import KINDS, TEXT, Noise, build

PROMPTS = (
    "who?", "what colour is the ship in the northern harbour?", "who leads the bridge?", "what stands beside the river?",
    "two or three towers?", "who?", "is the lamp red, or blue, or yellow, or green, or none of these?",
)  # fmt: skip
ANSWERS = ["green", "Mara Venn", "two red towers", "the old bridge", "three", "a blue square", "red"]
NEW = 4


def asks(kind: str) -> list[Ask]:
    """Pictures and text in turn for an image-text model."""
    pictures = [Noise(1), None, Noise(2, 32, 64), Noise(1), None, Noise(3), None]
    return [Ask(p, None if kind in TEXT else x) for p, x in zip(PROMPTS, pictures)]


def assert_same(a: Score, b: Score) -> None:
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
    np.testing.assert_array_equal(a.hits, b.hits)


def scored(r: Response) -> Score:
    assert r.score is not None
    return r.score


LINES = ("who", "\n", " ", "\n\n", ".\n", "green\nred", "\u00a0", "東", "</s>", "<pad>")


@settings(deadline=None)
@given(st.lists(st.sampled_from(LINES), max_size=12), st.integers(0, 12))
def test_a_row_ends_behind_its_first_line_and_not_before(parts: list[str], n: int) -> None:
    """Whatever follows an end changes nothing; without an end the text is still its first line, or not yet begun."""
    handle = build("gpt2")
    ids = handle.tokenizer("".join(parts), add_special_tokens=False)["input_ids"]
    said = [natural_stop(handle.tokenizer.decode(ids[:k], skip_special_tokens=True)) for k in range(len(ids) + 1)]
    stop, ended = FirstLine(handle, [ids[:n]], 0), []
    for k in range(1, len(ids) + 1):
        ended.append(bool(stop(torch.tensor([ids[:k]]), None)[0]))
    for k, now in enumerate(ended, 1):
        assert not now or (said[k] == said[-1] and k >= min(n, len(ids)))
    whole = handle.tokenizer.decode(ids, skip_special_tokens=True).strip()
    if ended and "\n" in whole and whole.isascii():
        assert ended[-1]


def first_words(predictor: ModelPredictor, some: list[Ask]) -> list[str]:
    """What the model says first: an answer that a generation follows."""
    ids = [int(x.top_ids[0]) for x in predictor.inspect(some)]
    return [predictor.handle.tokenizer.decode([i]).strip() or "red" for i in ids]


@pytest.mark.parametrize("kind", KINDS)
def test_batched_equals_one_by_one(kind: str) -> None:
    predictor, some = ModelPredictor(build(kind)), asks(kind)
    together = predictor.respond(some, ANSWERS, NEW)
    for one, answer, got in zip(some, ANSWERS, together):
        alone = predictor.respond([one], [answer], NEW)[0]
        assert got.generated == alone.generated
        assert_same(scored(got), scored(alone))


@pytest.mark.parametrize("kind", KINDS)
def test_respond_is_score_and_generate(kind: str) -> None:
    predictor, some = ModelPredictor(build(kind)), asks(kind)
    for answers in (ANSWERS, first_words(predictor, some)):
        both = predictor.respond(some, answers, NEW)
        for got, score in zip(both, predictor.score(some, answers)):
            assert_same(scored(got), score)
        assert [r.generated for r in both] == predictor.generate(some, NEW)
        assert [len(scored(r).hits) for r in both] == [len(answer_ids(predictor.handle, a, x)) for a, x in zip(some, answers)]


@pytest.mark.parametrize("kind", KINDS)
def test_score_is_the_log_softmax_of_a_plain_forward(kind: str) -> None:
    handle, some = build(kind), asks(kind)
    for one, answer, score in zip(some, ANSWERS, ModelPredictor(handle).score(some, ANSWERS)):
        ids = answer_ids(handle, one, answer)
        with torch.no_grad():
            logits = handle.model(**collate(handle, [one], [ids]).inputs).logits[0, -len(ids) - 1 : -1]
        want = logits.double().log_softmax(-1)[range(len(ids)), ids]
        np.testing.assert_allclose(score.logprobs, want, atol=1e-4)
        np.testing.assert_array_equal(score.hits, (logits.argmax(-1) == torch.tensor(ids)).numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_the_argmax_of_plain_forwards(kind: str) -> None:
    """Token by token without a cache of keys and values, one row at a time."""
    handle = build(kind)
    end = handle.tokenizer.eos_token_id
    for one, said in zip(asks(kind), ModelPredictor(handle).generate(asks(kind), NEW)):
        ids: list[int] = []
        while len(ids) < NEW and end not in ids:
            with torch.no_grad():
                ids.append(int(handle.model(**collate(handle, [one], [ids]).inputs).logits[0, -1].argmax()))
        assert said == natural_stop(handle.tokenizer.decode(ids, skip_special_tokens=True))


@pytest.mark.parametrize("kind", KINDS)
def test_probing_leaves_model_and_generators_alone(kind: str) -> None:
    handle = build(kind)
    before = (torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy(), random.getstate(), handle.hash)  # noqa: NPY002
    predictor, some = ModelPredictor(handle), asks(kind)
    predictor.respond(some, ANSWERS, NEW)
    predictor.score(some, ANSWERS)
    predictor.inspect(some, [0, -1])
    predictor.text_logprobs(["the old bridge"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state(legacy=False)["state"]["key"] == before[1]).all()  # noqa: NPY002
    assert random.getstate() == before[2]
    assert weights_hash(handle.model) == before[3]
    assert not any(m._forward_hooks or m._forward_pre_hooks for layer in handle.layers for m in layer.modules())
    assert not any(p.requires_grad or p.grad is not None for p in handle.model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_inspection(kind: str) -> None:
    handle, some = build(kind), asks(kind)
    seen = ModelPredictor(handle).inspect(some, [0, -1], top_k=5)
    again = ModelPredictor(handle, rows=2).inspect(some, [0, -1], top_k=5)
    for one, a, b in zip(some, seen, again):
        assert a.top_ids.shape == (5,)
        assert a.hidden.shape == (2, handle.width)
        assert a.hidden.dtype == np.float32
        np.testing.assert_allclose(a.hidden, b.hidden, atol=1e-4, rtol=1e-4)
        batch = collate(handle, [one])
        with torch.no_grad():
            out: Any = handle.model(**batch.inputs)
        logp = out.logits[0, -1].log_softmax(-1)
        assert a.entropy == pytest.approx(float(-(logp.exp() * logp).sum()), abs=1e-4)
        assert a.top_ids.tolist() == logp.topk(5).indices.tolist()
        assert not np.allclose(a.hidden[0], a.hidden[1])


def test_inspected_states_are_the_layers_own_outputs() -> None:
    handle, some = build("llama"), [Ask("who?")]
    with torch.no_grad():
        states: Any = handle.model(**collate(handle, some).inputs, output_hidden_states=True).hidden_states
    hidden = ModelPredictor(handle).inspect(some, [0, 1, 2])[0].hidden
    np.testing.assert_allclose(hidden[:2], torch.stack([s[0, -1] for s in states[1:3]]), atol=1e-5)
    normed = handle.norm(torch.from_numpy(hidden[2])).detach()
    np.testing.assert_allclose(normed, states[3][0, -1], atol=1e-4)


def test_inspection_without_layers_and_of_nothing() -> None:
    predictor = ModelPredictor(build("gpt2"))
    assert predictor.inspect([Ask("who?")])[0].hidden.shape == (0, 64)
    assert predictor.inspect([]) == predictor.respond([], []) == predictor.score([], []) == predictor.text_logprobs([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_text_logprobs_equal_a_direct_computation(kind: str) -> None:
    handle = build(kind)
    texts = ["the small lamp stands beside the river", "a red circle", "three towers and the old bridge, or two yellow stars"]
    got = ModelPredictor(handle, rows=2).text_logprobs(texts)
    for text, row in zip(texts, got):
        batch = collate(handle, [Ask("who?")])
        ids = torch.tensor([handle.tokenizer(text)["input_ids"]])
        extra = {k: v for k, v in batch.inputs.items() if k not in ("input_ids", "attention_mask")}
        with torch.no_grad():
            logits = handle.model(input_ids=ids, attention_mask=torch.ones_like(ids), **extra).logits[0, :-1]
        want = logits.double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        np.testing.assert_allclose(row, want, atol=1e-4)


def test_around_is_entered_once_a_batch_and_sees_the_prompt_alone() -> None:
    handle, some = build("llava"), asks("llava")
    seen: list[Any] = []

    @contextmanager
    def around(batch: Any) -> Any:
        seen.append(batch)
        yield

    explain = lambda batch: [{"row": a.prompt} for a in batch.asks]  # noqa: E731
    out = ModelPredictor(handle, around, explain).generate(some, NEW)
    assert len(out) == 7
    assert len(seen) == 2
    assert sorted(a.prompt for b in seen for a in b.asks) == sorted(PROMPTS)
    assert not any(b.answer.any() for b in seen)
    extras = [r.extras for r in ModelPredictor(handle, around, explain).respond(some, ANSWERS, NEW)]
    assert extras == [{"row": p} for p in PROMPTS]


def test_limits_of_a_batch_change_nothing() -> None:
    handle, some = build("qwen2_vl"), asks("qwen2_vl")
    wide = ModelPredictor(handle).respond(some, ANSWERS, NEW)
    for narrow in (ModelPredictor(handle, rows=2), ModelPredictor(handle, tokens=60), ModelPredictor(handle, tokens=1)):
        for a, b in zip(wide, narrow.respond(some, ANSWERS, NEW)):
            assert a.generated == b.generated
            assert_same(scored(a), scored(b))


def test_a_picture_batch_leaves_nothing_for_the_text_after_it() -> None:
    predictor = ModelPredictor(build("qwen2_vl"))
    text = [Ask(p) for p in PROMPTS[:3]]
    fresh = predictor.generate(text, 8)
    predictor.generate([Ask(p, Noise(i, 32, 64)) for i, p in enumerate(PROMPTS)], 8)
    assert predictor.generate(text, 8) == fresh


def test_generation_settings_of_a_checkpoint_do_not_count() -> None:
    """Checkpoints ship sampling and penalties; a probe measures the model, not those."""
    handle = build("llama", seed=3)
    plain = ModelPredictor(handle).respond([Ask("who?")], ["green"], 12)[0]
    kept = handle.model.generation_config.to_dict()
    handle.model.generation_config.update(
        repetition_penalty=5.0, do_sample=True, temperature=9.0, top_k=3, no_repeat_ngram_size=1, bad_words_ids=[[5]],
        suppress_tokens=[7], min_new_tokens=9, forced_eos_token_id=2, num_beams=4, max_length=3,
    )  # fmt: skip
    try:
        other = ModelPredictor(handle).respond([Ask("who?")], ["green"], 12)[0]
    finally:
        handle.model.generation_config = type(handle.model.generation_config)(**kept)
    assert other.generated == plain.generated
    assert_same(scored(other), scored(plain))


@pytest.mark.parametrize("kind", ["gpt2", "llava"])
def test_the_likeliest_first_tokens_are_named_in_order(kind: str) -> None:
    handle = build(kind)
    some = asks(kind)
    responses = ModelPredictor(handle, rows=3).respond(some, ANSWERS, NEW)
    told = ModelPredictor(handle).inspect(some, top_k=FIRST_IDS)
    assert [r.first_ids for r in responses] == [tuple(i.top_ids.tolist()) for i in told]
