"""Training examples of beliefs: photos, crops, questions after stated facts, the mixture of a batch."""

from __future__ import annotations

import numpy as np
import pytest

from testbed.core.events import Question
from testbed.editors.retrieval import prompts
from testbed.pretraining.beliefs import PER_READING_ROW, BeliefExamples, crop, gather, shrink
from tests.helpers.photos import Shot, beliefs


def test_beliefs_are_gathered_by_photo_and_contradictions_refused():
    groups, unreadable = gather(list(beliefs()))
    assert [g.photo is None for g in groups] == [False] * 4 + [True] and not unreadable
    with pytest.raises(ValueError, match="two answers"):
        gather([*beliefs(), Question("general", "What is the sky?", "grey")])
    with pytest.raises(ValueError, match="no answer"):
        gather([Question("locality_far", "What is it?")])


def test_crops_are_new_squares_of_the_photo():
    rng = np.random.default_rng(0)
    photo = shrink(Shot("x").load())
    assert photo.shape == (128, 96, 3)
    a, b = crop(photo, rng), crop(photo, rng)
    assert a.shape == (48, 48, 3) and a.dtype == np.uint8 and not np.array_equal(a, b)


def test_beliefs_in_context_are_overridden_or_kept():
    examples = BeliefExamples(gather(list(beliefs()))[0], np.random.default_rng(0))
    asked = examples.text_only[0]
    made = [examples.in_context(asked) for _ in range(100)]
    assert all(asked.prompt in e.prompt for e in made)
    kept = [e for e in made if e.answer == asked.answer]
    assert kept and len(kept) < len(made)


def test_reading_examples_state_facts_that_override_beliefs_or_do_not():
    examples = BeliefExamples(gather(list(beliefs()))[0], np.random.default_rng(0), reading=0.5)
    asked = examples.text_only[0]
    forced, free = ([examples.after_facts(asked, overrides) for _ in range(100)] for overrides in (True, None))
    for e in forced:
        assert e.prompt.count(asked.prompt) == 2 and f"{asked.prompt} {e.answer}." in e.prompt
    kept = [e for e in free if e.prompt.count(asked.prompt) == 1]
    assert 0 < len(kept) < 100
    assert {e.answer for e in kept} <= {asked.answer, prompts.NONE}
    known = {e.answer for e in examples.text_only}
    assert {e.answer for e in forced} - known, "answers that no belief has are to be copied too"
    assert len(examples.reading_row()) == PER_READING_ROW


@pytest.mark.parametrize(
    ("photos", "texts", "rows"), [(9, 0, (24, 0)), (0, 9, (0, 24)), (72, 140, (24, 4)), (315, 16_230, (7, 21)), (1, 10**5, (4, 24))]
)
def test_a_batch_holds_rows_with_and_without_photos_by_their_numbers(photos, texts, rows):
    examples = BeliefExamples(gather(list(beliefs()))[0], np.random.default_rng(0))
    examples.with_photo, examples.text_only = examples.with_photo[:1] * photos, examples.text_only[:1] * texts
    assert examples.rows() == rows
