"""SERAC: the scope classifier, the route of a question, and the memory."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from testbed.checks.editors import answers, same, same_up_to_rounding
from testbed.core.events import Ask, EditBatch, EditEvent
from testbed.editors.meta.examples import generator_of
from testbed.editors.meta.scope import ScopeClassifier
from testbed.editors.meta.serac import Serac, SeracConfig, SeracTask
from testbed.model.predictor import ModelPredictor
from tests.helpers.facts import FACTS, META_POOL, fact
from tests.helpers.models import Noise, build

BRIEF: dict[str, Any] = {"train_steps": 2, "judge_every": 2, "train_batch": 4}
OTHER = [Ask("what colour is the ship?"), Ask("two yellow stars, three towers")]


def editor(kind: str = "llama", **config: Any) -> Serac:
    made = Serac(SeracConfig(**{**BRIEF, **config}))
    made.prepare(build(kind), META_POOL)
    return made


def applied(made: Serac, *events: EditEvent, step: int = 1) -> Serac:
    assert not made.apply(EditBatch(events, step)).failed
    return made


@cache
def scope(pictures: bool = False) -> ScopeClassifier:
    return ScopeClassifier.fresh(build("llava"), 16, pictures, seed=0)


def s_of(scope: ScopeClassifier, a: Ask, b: Ask) -> float:
    return float(scope.similarity(scope.features([a]), scope.features([b])).detach())


def test_equal_questions_are_in_scope_with_certainty() -> None:
    """Equation 1 of `scope.py`, against its definition."""
    a, b = FACTS[0].ask(), OTHER[0]
    assert s_of(scope(), a, a) == 1.0
    distance = (scope().features([a]) - scope().features([b])).square().sum()
    assert s_of(scope(), a, b) == pytest.approx(float((-scope().tensors["c"].exp() * distance).exp()), rel=1e-5)


def test_a_scope_of_texts_sees_no_picture_and_one_of_images_does() -> None:
    one, two = (Ask("Who leads the country with this emblem?", Noise(n)) for n in (1, 2))
    assert s_of(scope(False), one, two) == 1.0
    assert s_of(scope(True), one, two) < 1.0
    assert s_of(scope(True), one, replace(one)) == 1.0


def test_a_pair_that_the_text_cannot_tell_apart_counts_in_no_loss() -> None:
    one, two = (Ask("Who leads the country with this emblem?", Noise(n)) for n in (1, 2))
    loss, told = scope(False).loss([one], [one], [two])
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-5)
    assert float(told) == 1.0
    assert float(scope(True).loss([one], [one], [two])[0].detach()) > 0


def test_the_classifier_learns_the_pairs_that_it_is_trained_on() -> None:
    handle = build("llama")
    learned = ScopeClassifier.fresh(handle, 16, False, seed=1)
    edits = META_POOL.edits
    triple = [e.event.ask() for e in edits], [e.rephrasings[0] for e in edits], [e.locality[0].ask() for e in edits]
    adam = torch.optim.Adam(list(learned.tensors.values()), lr=0.05)
    first, last = None, torch.zeros(())
    for _ in range(60):
        adam.zero_grad()
        last, _ = learned.loss(*triple)
        first = first if first is not None else float(last.detach())
        last.backward()
        adam.step()
    assert float(last.detach()) < 0.5 * (first or 0.0)


def test_the_addition_begins_at_zero_and_both_parts_learn() -> None:
    made = editor()
    task = SeracTask(made.handle, made.targets, ScopeClassifier.fresh(made.handle, 16, False, 0), made_examples(made), made.config)
    assert all(not t.detach().any() for n, t in task.tensors.items() if n.startswith("v."))
    task.loss(generator_of(0, 1)).backward()
    assert all(t.grad is not None and bool(t.grad.any()) for n, t in task.tensors.items() if n.startswith(("v.", "scope.E")))


def made_examples(made: Serac) -> Any:
    from testbed.editors.meta.examples import examples_of

    return examples_of(made.handle, META_POOL.edits, 0.3)


def test_a_miss_is_the_model_itself_and_a_hit_is_routed_alike_for_scores_and_texts() -> None:
    made = applied(editor(), *FACTS)
    predictor, base = made.predictor(), ModelPredictor(made.handle)
    found = predictor.respond([FACTS[0].ask(), *OTHER], ["green"] * 3, 4)
    assert found[0].extras["used"] == [FACTS[0].id]
    assert [r.extras["used"] for r in found[1:]] == [[], []]
    assert same([replace(r, extras={}) for r in found[1:]], answers_of(base, OTHER))
    scores = predictor.score([FACTS[0].ask(), *OTHER], ["green"] * 3)
    assert all(r.score is not None and np.allclose(r.score.logprobs, s.logprobs, atol=1e-5) for r, s in zip(found, scores))
    alone = predictor.respond([FACTS[0].ask()], ["green"], 4)
    assert same_up_to_rounding(found[:1], alone)


def answers_of(predictor: Any, asks: list[Ask]) -> Any:
    return predictor.respond(asks, ["green"] * len(asks), 4)


def test_the_newest_of_equal_edits_answers_and_undo_brings_the_old_one_back() -> None:
    made = applied(editor(), FACTS[0])
    ask = [FACTS[0].ask()]
    before = answers(made.predictor(), ask)
    newer = fact("the northern harbour", "green", revises=FACTS[0].id)
    applied(made, newer, step=2)
    assert answers(made.predictor(), ask)[0].extras["used"] == [newer.id]
    made.revert([newer.id])
    assert same(answers(made.predictor(), ask), before)
    made.revert([FACTS[0].id])
    assert same(answers(made.predictor(), ask), answers(ModelPredictor(made.handle), ask))


def test_the_order_of_unrelated_edits_does_not_matter() -> None:
    one, two = applied(editor(), *FACTS), applied(editor(), *reversed(FACTS))
    asks = [e.ask() for e in FACTS]
    assert same(answers(one.predictor(), asks), answers(two.predictor(), asks))


def test_a_predictor_of_the_image_scope_finds_the_edit_of_the_same_picture() -> None:
    made = editor("llava", scope="image")
    edits = [fact("this one", "green", picture=1), fact("this one", "Mara Venn", picture=2)]
    edits = [replace(e, subject=f"s{i}", id="") for i, e in enumerate(edits)]
    applied(made, *edits)
    found = answers(made.predictor(), [e.ask() for e in edits])
    assert [r.extras["used"] for r in found] == [[e.id] for e in edits]
    text = applied(editor("llava"), *edits)
    assert [r.extras["used"] for r in answers(text.predictor(), [e.ask() for e in edits])] == [[edits[1].id]] * 2
