"""How answers are judged: a table of cases, and laws that hold for any text."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from testbed.core.grading import begins, contains, exact, first_sentence, natural_stop, normalise

NORMAL = [
    ("The  Green Lamp.", "green lamp"),
    ("an apple", "apple"),
    ("A", "a"),
    ("+", "+"),
    ("the", "the"),
    ("", ""),
    ("  ", ""),
    ("don't", "dont"),
    ("CAFÉ", "café"),
    ("ﬁsh", "fish"),
    ("Straße", "strasse"),
    ("ß\u0301", "s\u015b"),
    ("the  a", "a"),
    ("2 000", "2 000"),
    ("theatre another", "theatre another"),
    ("rock-and-roll", "rock and roll"),
    ("Vitamin A", "vitamin a"),
    ("The Who", "who"),
    ("Paris,France", "paris france"),
    ("node.js", "nodejs"),
    ("St. Louis", "st louis"),
    ("No. 5", "no 5"),
    ("$ 5 %", "$ 5%"),
    ("20 °C", "20 c"),
    ("١٢", "١٢"),
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
    ("-5", ["5"], False),
    ("\u22125", ["-5"], True),
    ("3.5", ["35"], False),
    ("3,5", ["35"], False),
    ("C#", ["C"], False),
    ("C++", ["C"], False),
    ("5%", ["$5"], False),
    ("5 %", ["5%"], True),
    ("Vitamin A", ["vitamin"], False),
    ("1,000", ["1000"], True),
    ("1\u00a0000\u00a0000", ["1,000,000"], True),
    ("1,00", ["100"], False),
    ("Jean-Luc", ["Jean Luc"], True),
    ("St. Louis", ["St Louis"], True),
    ("The Hague", ["Hague"], True),
    ("U.S.A.", ["USA"], True),
    ("the U.S. dollar", ["US dollar"], True),
    ("J. R. R. Tolkien", ["J.R.R. Tolkien", "nobody"], True),
    ("JRR Tolkien", ["J. R. R. Tolkien"], True),
    ("Côte d\u2019Ivoire", ["Côte d'Ivoire"], True),
    ("東京。", ["東京"], True),
    ("¿Madrid?", ["Madrid"], True),
    ("\u201cParis\u201d", ["Paris"], True),
    ("AC/DC", ["AC DC"], True),
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


def test_number_words_are_digits_only_where_that_is_asked_for() -> None:
    assert exact("Two", ["2"], number_words=True)
    assert exact("none", ["0"], number_words=True)
    assert not exact("Two", ["2"])


BEGINS = [
    ("Russian, Russian)", ["Russian"], True),
    ("Russian", ["Russian"], True),
    ("Russians", ["Russian"], False),
    ("It is Russian", ["Russian"], False),
    ("New York City", ["York", "New York"], True),
    ("東京です", ["東京"], True),
    ("C++ and more", ["C"], False),
    ("5% of it", ["5%"], True),
    ("5%", ["5"], False),
    ("", ["Russian"], False),
]


@pytest.mark.parametrize(("generated", "golds", "want"), BEGINS)
def test_begins(generated: str, golds: list[str], want: bool) -> None:
    assert begins(generated, golds) is want


CONTAINS = [
    ("The capital is Astana.", ["Astana"], ["Almaty"], True),
    ("It was Almaty and is Astana now.", ["Astana"], ["Almaty"], False),
    ("I do not know. Astana", ["Astana"], [], False),
    ("St. Louis, of course. Or Paris.", ["St Louis"], ["Paris"], True),
    ("Astanas", ["Astana"], [], False),
    ("New York City", ["New York City"], ["New York"], True),
    ("New York City", ["New York"], ["New York City"], False),
    ("首都は東京です。大阪ではない。", ["東京"], ["大阪"], True),
    ("It costs 3.5 euros. Not 4.", ["3.5"], ["4"], True),
]


@pytest.mark.parametrize(("generated", "golds", "others", "want"), CONTAINS)
def test_contains(generated: str, golds: list[str], others: list[str], want: bool) -> None:
    assert contains(generated, golds, others) is want


@pytest.mark.parametrize(
    ("text", "want"),
    [("One. Two.", "One."), ("J. Smith left. So", "J. Smith left."), ("3.5 is it! Yes", "3.5 is it!"), ("a\nb. c", "a"), ("", "")],
)
def test_first_sentence(text: str, want: str) -> None:
    assert first_sentence(text) == want


@given(st.text(), st.lists(st.text(), max_size=3))
def test_an_exact_answer_begins_with_a_gold_one(generated: str, golds: list[str]) -> None:
    assert exact(generated, golds) <= begins(generated, golds)
    assert begins(generated, [generated])


@given(st.text(alphabet="abc AB.,'-$%+5 \u00a0\u2019", max_size=12), st.text(alphabet="abc AB.,'-$%+5 ", max_size=8))
def test_other_candidates_only_take_a_hit_away(generated: str, gold: str) -> None:
    assert contains(generated, [gold], ["b"]) <= contains(generated, [gold])
