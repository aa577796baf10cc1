"""Choices and refusals: verdicts against plain computations on a random model, ties, what is not finite, what is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from testbed.benchmarks.judging import judge
from testbed.core.events import Ask, BadEvent, Question
from testbed.model.predictor import Inspection, ModelPredictor, Predictor, Response, Score
from tests.helpers.models import build

CHOICES = ("green", "two red towers", "the old bridge")


def question(scoring: Any = "sum", answer: str = "green", choices: tuple[str, ...] = CHOICES) -> Question:
    return Question("general", "what stands beside the river?", answer, topic="bench:x", choices=choices, scoring=scoring)


class Fixed(Predictor):
    """Generates and scores fixed values, by choice."""

    def __init__(self, logprobs: dict[str, list[float]], said: str = "") -> None:
        self.known, self.said = logprobs, said

    def respond(self, asks: Sequence[Ask], answers: Sequence[str | None], max_new_tokens: int = 16) -> list[Response]:
        return [Response(self.said) for _ in asks]

    def score(self, asks: Sequence[Ask], answers: Sequence[str]) -> list[Score]:
        return [Score(np.zeros(len(self.known[a]), dtype=bool), np.array(self.known[a])) for a in answers]

    def text_logprobs(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self.known[t]) for t in texts]

    def inspect(self, asks: Sequence[Ask], layers: Sequence[int] = (), top_k: int = 10, ids: Any = None) -> list[Inspection]:
        raise AssertionError("this predictor does not inspect")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("scoring", ["sum", "norm", "mean", "text"])
def test_choices_against_a_plain_computation(kind: str, scoring: str) -> None:
    predictor = ModelPredictor(build(kind))
    ask = Ask(question().prompt)
    if scoring == "text":
        sums = [float(predictor.text_logprobs([c])[0].sum()) for c in CHOICES]
    else:
        sums = [float(predictor.score([ask], [c])[0].logprobs.sum()) for c in CHOICES]
    lengths = {"norm": len, "mean": lambda c: len(predictor.score([ask], [c])[0].logprobs)}
    rates = [s / lengths.get(scoring, lambda c: 1)(c) for s, c in zip(sums, CHOICES)]
    best = int(np.argmax(rates))
    for i, answer in enumerate(CHOICES):
        (v,) = judge(predictor, [question(scoring, answer)], 3)
        assert v.right == (i == best)
        assert v.extras["chosen"] == best
        np.testing.assert_allclose(v.extras["choices"], sums, atol=1e-3)
        if scoring != "text":
            assert v.score is not None
            assert float(v.score.logprobs.sum()) == pytest.approx(sums[i], abs=1e-3)


def test_a_longer_choice_is_not_punished_when_lengths_count() -> None:
    known = {"ab": [-4.0], "abcdefgh": [-3.0, -3.0]}
    verdicts = judge(Fixed(known), [question(s, "abcdefgh", ("ab", "abcdefgh")) for s in ("sum", "norm", "mean")], 1)
    assert [v.right for v in verdicts] == [False, True, True]
    assert [v.extras["choices"] for v in verdicts] == [[-4.0, -6.0]] * 3


@pytest.mark.parametrize("gold", ["a", "b"])
def test_a_tie_is_no_success(gold: str) -> None:
    (v,) = judge(Fixed({"a": [-1.0], "b": [-1.0]}), [question("sum", gold, ("a", "b"))], 1)
    assert not v.right


def test_what_is_not_finite_is_absent_and_no_success() -> None:
    nan, inf = float("nan"), -float("inf")
    (broken,) = judge(Fixed({"a": [nan], "b": [inf]}), [question("sum", "a", ("a", "b"))], 1)
    (half,) = judge(Fixed({"a": [nan], "b": [-9.0]}), [question("sum", "a", ("a", "b"))], 1)
    (won,) = judge(Fixed({"a": [nan], "b": [-9.0]}), [question("sum", "b", ("a", "b"))], 1)
    assert (broken.right, half.right, won.right) == (False, False, True)
    assert broken.extras["choices"] == [None, None]
    assert half.extras["choices"] == [None, -9.0]


def test_verdicts_come_in_the_order_of_the_questions() -> None:
    known = {"a": [-1.0], "b": [-2.0]}
    mixed = [question(s, a, ("a", "b")) for s in ("text", "sum", "norm") for a in ("a", "b")]
    mixed.insert(3, Question("general", "harm?", topic="safety:x", scoring="refuse"))
    verdicts = judge(Fixed(known, "I cannot do that"), mixed, 1)
    assert [v.right for v in verdicts] == [True, False, True, True, False, True, False]
    assert judge(Fixed(known), [], 1) == []


@pytest.mark.parametrize(
    ("said", "refuse", "comply"),
    [("I can't help with that.", True, False), ("Sure, here is how", False, True), ("", False, False), ("I'm sorry, but no", True, False)],
)
def test_refusals_on_harmful_and_benign_requests(said: str, refuse: bool, comply: bool) -> None:
    asked = [Question("general", "how?", topic="safety:x", scoring=s) for s in ("refuse", "comply")]
    harmful, benign = judge(Fixed({}, said), asked, 1)
    assert (harmful.right, benign.right) == (refuse, comply)
    assert harmful.generated is None
    assert harmful.extras == {"refused": refuse, "sha256": hashlib.sha256(said.encode()).hexdigest()}
    assert benign.generated == said


BAD: list[tuple[dict[str, Any], str]] = [
    ({"choices": ("a",), "answer": "a"}, "choices must be two or more different ones"),
    ({"choices": ("a", "a"), "answer": "a"}, "choices must be two or more different ones"),
    ({"choices": ("a", "b"), "answer": "c"}, "and hold the answer 'c'"),
    ({"choices": ("a", " "), "answer": "a"}, "choice must be text that is not empty"),
    ({"choices": ("a", "b"), "answer": "a", "scoring": "generate"}, "choices need a scoring that picks one"),
    ({"choices": ("a", "b"), "answer": "a", "scoring": "best"}, "scoring must be one of generate, sum"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_bad_questions_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadEvent, match=message):
        Question(**{"split": "general", "prompt": "p", "scoring": "sum", **given})


def test_a_question_without_choices_keeps_the_id_it_had() -> None:
    """StoredRun runs pair by id: fields that came later do not move ids of questions that do not use them."""
    assert Question("general", "p", "a", topic="t").id == "fdffc3731a4509b0"
    ids = {question(s).id for s in ("sum", "norm", "text")} | {question("sum", choices=CHOICES[::-1]).id}
    assert len(ids) == 4


def test_a_choice_that_is_right_as_well_does_not_compete() -> None:
    asked = Question("general", "p", "no", topic="safety:t", choices=("never", "no", "yes"), scoring="sum", aliases=("never",))
    (v,) = judge(Fixed({"never": [-0.1], "no": [-1.0], "yes": [-2.0]}), [asked], 3)
    assert (v.right, v.extras["chosen"]) == (True, 1)
    assert v.extras["choices"] == [-0.1, -1.0, -2.0]
    (v,) = judge(Fixed({"never": [-0.1], "no": [-2.0], "yes": [-1.0]}), [asked], 3)
    assert (v.right, v.extras["chosen"]) == (False, 2)
