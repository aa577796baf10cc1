"""The options of SCR in CARML's form: fused channels, and a boost of the stored answer's tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from testbed.core.events import Ask, EditBatch
from testbed.editors.retrieval.boost import AnswerBoost
from testbed.editors.retrieval.channels import ChannelFusion, channel_weights, named_channels
from testbed.editors.retrieval.retriever import most_similar
from testbed.editors.retrieval.scr import Scr, ScrConfig
from testbed.model.encoding import answer_ids, collate
from testbed.model.predictor import ModelPredictor
from tests.helpers.models import Noise, build
from tests.helpers.retrieval_facts import FACTS, POOL, UNRELATED, ask_about, base_responses, fact, same_responses

PICTURED = [fact(i, f"p{i}", picture=i, name=f"the place {i}") for i in range(5)]
EVERY = "visual+textual+joint"


def make(kind: str = "llava", **config: Any) -> Scr:
    editor = Scr(ScrConfig(**{"gate": "topk", "encoder": "bm25", "other_pictures": 0.0, **config}))
    editor.prepare(build(kind), POOL)
    assert not editor.apply(EditBatch(tuple(FACTS[:3] if kind == "llama" else [*FACTS[:3], *PICTURED]), 1)).failed
    return editor


@given(st.integers(1, 3), st.integers(1, 8), st.integers(0, 10_000))
def test_the_weights_of_channels_sum_to_one_and_one_channel_has_all(channels: int, candidates: int, seed: int) -> None:
    similarity = np.random.default_rng(seed).uniform(-1, 1, (channels, candidates)).astype(np.float32)
    weights = channel_weights(similarity, 0.05)
    assert weights.shape == (channels,)
    assert bool((weights > 0).all())
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    if channels == 1:
        assert weights.tolist() == [1.0]


def test_a_channel_that_cannot_tell_candidates_apart_or_stands_alone_weighs_less() -> None:
    sure, vague, other = [0.9, 0.1, 0.1], [0.5, 0.5, 0.5], [0.1, 0.1, 0.9]
    one, two = channel_weights(np.array([sure, vague]), 0.05)
    assert one > two
    weights = channel_weights(np.array([sure, sure, other]), 0.05)
    assert weights[0] == pytest.approx(weights[1]) and weights[2] < weights[0]


@given(st.integers(1, 12), st.integers(1, 4), st.integers(0, 10_000))
def test_one_channel_ranks_as_that_channel_does_to_the_bit(n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    similarity = {"joint": rng.uniform(-1, 1, n).astype(np.float32)}
    alive = rng.uniform(size=n) < 0.7
    fused, kept = ChannelFusion(("joint",), candidates=max(4, k)).fused(similarity, alive)
    assert most_similar(fused, kept, k) == most_similar(similarity["joint"], alive, k)


def test_the_joint_channel_alone_is_the_retriever_without_fusion() -> None:
    plain = make().retriever()
    assert plain.fusion is None
    fused = replace(plain, fusion=ChannelFusion(("joint",)))
    asks = [*(ask_about(e) for e in PICTURED), ask_about(FACTS[0]), *UNRELATED, Ask("Who leads?", Noise(99))]
    assert plain.nearest(asks, 3) == fused.nearest(asks, 3)


def test_a_question_without_a_picture_meets_the_textual_channel_alone() -> None:
    asks = [*(ask_about(e) for e in FACTS), *UNRELATED]
    assert make(channels=EVERY).retriever().nearest(asks, 3) == make().retriever().nearest(asks, 3)


def test_every_channel_finds_the_fact_of_its_own_question_and_weights_do_not_depend_on_other_questions() -> None:
    asks = [ask_about(e) for e in PICTURED]
    for channels in ("visual", "textual", EVERY):
        retriever = make(channels=channels).retriever()
        found = retriever.nearest(asks, 2)
        assert [hits[0].fact.event_id for hits in found] == [e.id for e in PICTURED]
        assert found == [retriever.nearest([a], 2)[0] for a in asks]


def test_channels_that_are_unknown_or_named_twice_are_refused() -> None:
    assert named_channels(EVERY) == ("visual", "textual", "joint")
    assert [p.split()[0] for p in ScrConfig(channels="smell").problems()] == ["channels"]
    assert "differ" in ScrConfig(channels="visual+visual").problems()[0]
    assert not ScrConfig(channels=EVERY, boost=6).problems()


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_no_boost_is_the_editor_without_it_and_a_boost_makes_stored_answers_likelier(kind: str) -> None:
    asks = [ask_about(e) for e in FACTS[:3]]
    assert make(kind).predictor().boost is None  # type: ignore[attr-defined]
    plain, boosted = (make(kind, boost=b).predictor() for b in (0.0, 6.0))
    assert same_responses(plain.respond(asks, ["green"] * 3, 4), make(kind).predictor().respond(asks, ["green"] * 3, 4))
    found = boosted.score(asks, [e.target for e in FACTS[:3]])
    before = plain.score(asks, [e.target for e in FACTS[:3]])
    assert all(a.logprobs.mean() > b.logprobs.mean() for a, b in zip(found, before))


def test_a_boost_leaves_questions_without_a_fact_bit_equal() -> None:
    predictor = make("llama", gate="model", boost=6.0).predictor()
    predictor.base.generate = lambda asks, n=16, decided=None: ["none" for _ in asks]  # type: ignore[attr-defined]
    asks = [ask_about(e) for e in FACTS]
    assert same_responses(predictor.respond(asks, ["green"] * len(asks), 4), base_responses(asks))


def test_a_large_boost_pastes_the_answer_and_scores_and_texts_agree() -> None:
    predictor = make("llama", gate="oracle-context", boost=60.0).predictor()
    asks = [ask_about(e, True) for e in FACTS[:3]]
    found = predictor.respond(asks, [e.target for e in FACTS[:3]], 8)
    scores = predictor.score(asks, [e.target for e in FACTS[:3]])
    for r, s, e in zip(found, scores, FACTS):
        own = {*answer_ids(build("llama"), e.ask(), e.target), build("llama").tokenizer.eos_token_id}
        assert set(answer_ids(build("llama"), e.ask(), r.generated or e.target)) <= own or not r.generated
        assert r.score is not None and np.allclose(r.score.logprobs, s.logprobs, atol=1e-4)


def test_a_boost_raises_the_answers_logits_by_its_amount_and_no_other() -> None:
    handle, ask = build("llama"), ask_about(FACTS[0])
    boost = AnswerBoost(handle, 5.0)
    boost.remember(ask, FACTS[0].target)
    own = sorted({*answer_ids(handle, ask, FACTS[0].target), handle.tokenizer.eos_token_id})
    batch = collate(handle, [ask, Ask("what else?")], side="left")
    with torch.no_grad():
        before = handle.model(**batch.inputs, use_cache=False).logits
        with boost.around(batch):
            after = handle.model(**batch.inputs, use_cache=False).logits
    change = after - before
    assert torch.equal(after[1], before[1])
    assert torch.allclose(change[0][:, own], torch.full_like(change[0][:, own], 5.0), atol=1e-4)
    change[0][:, own] = 0
    assert not change.any()
    assert same_responses(ModelPredictor(handle, boost.around).respond([Ask("what else?")], ["green"], 4), base_padded(Ask("what else?")))


def base_padded(ask: Ask) -> Any:
    handle = build("llama")
    return ModelPredictor(handle, lambda batch: handle.swapped({})).respond([ask], ["green"], 4)
