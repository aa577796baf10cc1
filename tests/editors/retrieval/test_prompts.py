"""Prompt templates: which fact a reply names."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.core.grading import natural_stop
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


REPLIES = st.text("aA12) .:\n\u0130", max_size=8) | st.sampled_from(
    ["fact 2. Paris", "Statement 1) x", "St. Ives. ", "numbers", "7", "72", "St. Iv"]
)
SOME = st.lists(st.text("aA1. )\u0130", min_size=1, max_size=4).filter(str.strip) | st.sampled_from(TARGETS), min_size=1, max_size=4)


@settings(max_examples=500)
@given(REPLIES, SOME, st.integers(0, 20))
def test_a_reply_that_is_decided_names_the_same_fact_whatever_follows(reply: str, targets: list[str], n: int) -> None:
    if prompts.decided(reply[:n], targets):
        said, whole = natural_stop(reply[:n]), natural_stop(reply)
        assert prompts.named_fact(said, targets) == prompts.named_fact(whole, targets)


@pytest.mark.parametrize(
    ("reply", "known"),
    [
        *[("", False), ("Tur", False), ("Turin", False), ("turin. ", False), ("Turin is", True), ("T\ufffd", False), ("The", True)],
        *[
            ("1", False),
            ("0", False),
            ("12", True),
            ("4", True),
            ("1)", True),
            ("fact", False),
            ("fact 2", False),
            ("fact 2:", True),
            ("facts", True),
            ("7 ", False),
        ],
    ],
)
def test_a_reply_is_decided_as_soon_as_nothing_else_can_come_of_it(reply: str, known: bool) -> None:
    assert prompts.decided(reply, TARGETS) == known
