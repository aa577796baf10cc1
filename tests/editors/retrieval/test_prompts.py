"""Prompt templates: which fact a reply names."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.editors.retrieval import prompts

TARGETS = ["Turin", "7", "St. Ives"]


@pytest.mark.parametrize(
    ("answer", "index"),
    [
        *[("Turin", 0), (" turin. ", 0), ("7", 1), ("St. Ives", 2), ("1", 0), ("3)", 2), ("fact 2", 1)],
        *[("4", None), ("0", None), ("none", None), ("", None)],
    ],
)
def test_an_answer_names_a_fact_by_its_target_before_its_number(answer, index):
    assert prompts.named_fact(answer, TARGETS) == index


@given(st.lists(st.text("abc xyz", min_size=1).filter(str.strip), min_size=1, unique_by=lambda t: t.strip()), st.data())
def test_every_target_names_its_own_fact(targets, data):
    i = data.draw(st.integers(0, len(targets) - 1))
    assert prompts.named_fact(targets[i], targets) == i
    assert prompts.named_fact(prompts.NONE, targets) is None
