"""How answers are judged: a table of cases, and laws that hold for any text."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from testbed.core.grading import exact, natural_stop, normalise

NORMAL = [
    ("The  Green Lamp.", "green lamp"),
    ("an apple", "apple"),
    ("A", "a"),
    ("+", "+"),
    ("the", "the"),
    ("", ""),
    ("  ", ""),
    ("don't", "don t"),
    ("CAFÉ", "café"),
    ("ﬁsh", "fish"),
    ("Straße", "strasse"),
    ("ß\u0301", "s\u015b"),
    ("the  a", "the a"),
    ("2 000", "2 000"),
    ("theatre another", "theatre another"),
    ("rock-and-roll", "rock and roll"),
]


@pytest.mark.parametrize(("text", "want"), NORMAL)
def test_normalise(text: str, want: str) -> None:
    assert normalise(text) == want


EXACT = [
    ("Mara Venn", ["mara venn"], True),
    ("mara venn.", ["Mara Venn"], True),
    ("the lamp", ["lamp"], True),
    ("lamp", ["ship", "A lamp!"], True),
    ("Mara", ["Mara Venn"], False),
    ("Mara Venn is", ["Mara Venn"], False),
    ("", ["Mara"], False),
    ("", [""], True),
    ("Mara", [], False),
    ("+", ["-"], False),
    ("A", ["the"], False),
    ("cafe\u0301", ["café"], True),
]


@pytest.mark.parametrize(("generated", "golds", "want"), EXACT)
def test_exact(generated: str, golds: list[str], want: bool) -> None:
    assert exact(generated, golds) is want


@pytest.mark.parametrize(("text", "want"), [(" Mara\nWho", "Mara"), ("\n\nMara ", "Mara"), ("", ""), ("a\r\nb", "a")])
def test_natural_stop_is_the_first_line(text: str, want: str) -> None:
    assert natural_stop(text) == want


@given(st.text())
@example("the a")
@example("a-the")
@example("．")
@example("ß\u0301")
def test_normalise_twice_is_normalise_once(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(st.text())
def test_an_answer_equals_itself_whatever_its_case_and_ends(text: str) -> None:
    assert exact(text, [text])
    assert exact(f"  {text} ", [text])


@given(st.text(), st.text(), st.text())
def test_one_more_gold_never_takes_a_hit_away(generated: str, gold: str, more: str) -> None:
    assert exact(generated, [gold]) <= exact(generated, [gold, more])


@given(st.text(), st.text())
def test_exact_is_symmetric(a: str, b: str) -> None:
    assert exact(a, [b]) == exact(b, [a])
