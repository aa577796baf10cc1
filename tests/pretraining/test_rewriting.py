"""The training of a post-editor: its examples, and a few steps of it."""

from __future__ import annotations

import numpy as np
import pytest

from streams.world.facts import world
from streams.world.words import phrasings
from testbed.editors.retrieval import prompts
from testbed.pretrain import BadPretrain, PretrainConfig, command_of, pretrain
from testbed.pretraining import stages
from testbed.pretraining.rewriting import RewritingExamples

WORLD = world(0, 0)


def test_examples_are_the_prompts_of_the_editor_and_their_answers_follow_from_the_fact():
    rewriting = RewritingExamples(WORLD, np.random.default_rng(0))
    wanted = []
    for _ in range(60):
        examples, _, shared = rewriting.row()
        for e in examples:
            whole = shared + e.prompt
            facts, _, rest = whole.removeprefix("Facts: 1) ").partition(" Answer: ")
            answer, _, question = rest.partition(" Rewrite for: ")
            assert whole == prompts.rewrite(facts, question, answer) and question
            assert e.answer == prompts.RETAIN or facts.endswith(f" {e.answer}.")
            wanted.append(e.answer == prompts.RETAIN)
    assert 0.4 < np.mean(wanted) < 0.6


def test_a_question_to_which_the_fact_is_irrelevant_is_another_one():
    rewriting = RewritingExamples(WORLD, np.random.default_rng(1), held_out=True)
    for _ in range(200):
        key, entity, _ = rewriting._stated_fact()
        question, answer = rewriting._irrelevant_question(key, entity)
        assert answer and question not in phrasings(*key, held_out=True)
    assert all(rewriting.question(True).answer != prompts.RETAIN for _ in range(20))
    assert all(rewriting.question(False).answer == prompts.RETAIN for _ in range(20))


def test_a_few_steps_leave_a_model_with_a_card(tmp_path):
    config = PretrainConfig("world-yearly", tmp_path / "writer", course="rewriting", steps=2, questions=4, threads=1)
    scores = pretrain(config)
    assert [s.ability for s in scores] == [stages.REWRITES, stages.LEAVES]
    assert (tmp_path / "writer" / "model.safetensors").is_file()
    card = (tmp_path / "writer" / "README.md").read_text()
    assert "--course rewriting" in card and "rewrites other models' answers" in card
    assert "--course rewriting" in command_of(config)


def test_a_training_without_a_model_to_start_from_says_how_to_make_one(tmp_path):
    with pytest.raises(BadPretrain, match="no model lies in"):
        pretrain(PretrainConfig("world-yearly", tmp_path / "out", course="rewriting", start=tmp_path / "none"))
