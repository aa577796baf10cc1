"""How answers are judged: a table of cases, and laws that hold for any text."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from testbed.core.grading import contains, exact, natural_stop, normalise, token_f1

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


CONTAINS = [
    ("It is Mara Venn, I think", ["mara venn"], True),
    ("nothing", ["not"], False),
    ("anything", ["thing"], False),
    ("x", [""], False),
    ("", ["x"], False),
    ("one two", ["three", "two"], True),
]


@pytest.mark.parametrize(("generated", "golds", "want"), CONTAINS)
def test_contains_means_whole_words(generated: str, golds: list[str], want: bool) -> None:
    assert contains(generated, golds) is want


@pytest.mark.parametrize(
    ("generated", "golds", "want"),
    [("red lamp", ["red lamp"], 1.0), ("red lamp", ["lamp"], 2 / 3), ("red red", ["red"], 2 / 3), ("ship", ["lamp"], 0.0), ("x", [], 0.0)],
)
def test_token_f1(generated: str, golds: list[str], want: float) -> None:
    assert token_f1(generated, golds) == pytest.approx(want)


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
    assert token_f1(text, [text]) in (0.0, 1.0)


@given(st.text(), st.text(), st.text())
def test_one_more_gold_never_takes_a_hit_away(generated: str, gold: str, more: str) -> None:
    for judge in (exact, contains, token_f1):
        assert judge(generated, [gold]) <= judge(generated, [gold, more])


@given(st.text(), st.text())
def test_exact_and_f1_are_symmetric_and_exact_implies_contains(a: str, b: str) -> None:
    assert exact(a, [b]) == exact(b, [a])
    assert token_f1(a, [b]) == pytest.approx(token_f1(b, [a]))
    assert 0 <= token_f1(a, [b]) <= 1
    if exact(a, [b]) and normalise(a):
        assert contains(a, [b])
