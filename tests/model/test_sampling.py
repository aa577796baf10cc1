"""Drawn texts: the drawing by hand, and that a text depends on its own seed alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from testbed.core.events import Ask, Question, Sampling
from testbed.model.generation import TopKSampler
from testbed.model.predictor import ModelPredictor
from tests.helpers.models import build

PROMPTS = ("Who owns the ship?", "Who owns the very old ship in the bay?", "the bridge")


class Given(Sampling):
    """Draws that a test chooses."""

    def draws(self) -> np.ndarray:
        return np.array([0.1, 0.55, 0.9])


def test_tokens_are_drawn_among_the_likeliest_by_hand() -> None:
    """Of probabilities 1/2, 1/4, 1/8, 1/8 the two likeliest share 2/3 and 1/3: 0.1 and 0.55 draw the first, 0.9 the second."""
    sampler, scores = TopKSampler([Given("", 3, 2), Given("", 3, 1)]), torch.tensor([0.25, 0.5, 0.125, 0.125]).log().repeat(2, 1)
    chosen = [sampler(torch.zeros(2, 1), scores).argmax(-1).tolist() for _ in range(3)]
    assert chosen == [[1, 1], [1, 1], [0, 1]]
    assert torch.isneginf(sampler(torch.zeros(2, 1), scores)).sum(-1).tolist() == [3, 3]


def test_frequencies_are_those_of_the_likeliest_tokens() -> None:
    scores = torch.tensor([[0.1, 0.3, 0.2, 0.4]]).log()
    sampler = TopKSampler([Sampling("s", tokens=4000, top_k=3)])
    counts = np.bincount([int(sampler(torch.zeros(1, 1), scores).argmax()) for _ in range(4000)], minlength=4)
    assert counts[0] == 0 and counts[1:] / 4000 == pytest.approx(np.array([3, 2, 4]) / 9, abs=0.03)


def test_a_text_is_the_same_alone_and_in_a_batch_and_greedy_answers_beside_it_stay() -> None:
    predictor = ModelPredictor(build("gpt2"))
    asks = [Ask(p, sampled=Sampling(p, tokens=20)) for p in PROMPTS]
    together = predictor.generate(asks)
    assert together == [predictor.generate([a])[0] for a in asks]
    assert together != predictor.generate([replace(a, sampled=Sampling("another", tokens=20)) for a in asks])
    mixed = predictor.generate([asks[0], Ask(PROMPTS[1]), asks[2]], 5)
    assert mixed == [together[0], predictor.generate([Ask(PROMPTS[1])], 5)[0], together[2]]
    longer = predictor.generate([Ask(p, sampled=Sampling(p, tokens=30)) for p in PROMPTS])
    assert all(b.startswith(a.rstrip("\ufffd")) for a, b in zip(together, longer))


def test_the_seed_of_a_question_is_its_id() -> None:
    question = Question("generation", "Ann plays", "piano", "e", scoring="sample")
    assert question.ask().sampled == Sampling(question.id)
    assert replace(question, scoring="generate", id="").ask().sampled is None
    assert Sampling("a").draws().shape == (100,) and (Sampling("a").draws() == Sampling("a").draws()).all()
