# pyright: strict
"""How a generated answer is judged. It needs the standard library only, so stored answers can be graded again anywhere.

Three verdicts are kept apart: `exact` (the whole answer), `begins` (the answer stands first, whatever follows: models
that were not taught to stop go on) and `contains` (the answer is a phrase of the first sentence and no other candidate
is: chat models answer in sentences). All compare normalised text (`normalise`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

VERSION = 2
"""Incremented whenever a verdict can change; the manifest records it."""

_SINGLE, _DOUBLE = "\u2018\u2019\u201a\u201b\u2032\u00b4`", "\u201c\u201d\u201e\u201f\u00ab\u00bb\u2033"
_SAME = str.maketrans(dict.fromkeys(_SINGLE, "'") | dict.fromkeys(_DOUBLE, '"'))
_DASHES = re.compile(r"[\u2010-\u2015\u2212\ufe58\ufe63\uff0d]")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:[,'\u00a0\u2009\u202f]\d{3})+(?!\d)")
"""A number written with its thousands apart: commas, apostrophes or spaces that do not break a line."""
_INITIALS = re.compile(r"\b(?:\w\.[ ]?){2,}")
_LEADING_ARTICLES = re.compile(r"(?:(?:a|an|the) )+(?=\S)")
_SEPARATORS = frozenset("-,;:/\\&_|")
"""Punctuation that stands between words, with or without a space."""
_KEPT = frozenset("%#+")
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_NUMBERS = {"none": "0", **{word: str(i) for i, word in enumerate(_WORDS)}}


def normalise(text: str, number_words: bool = False) -> str:
    """The text in lower case and NFKC, without punctuation, a leading English article and extra white space.

    Punctuation goes by Unicode category: it is dropped inside a word ("d'Ivoire", "U.S.A.") and becomes a space between
    words; hyphens, dashes, commas and slashes between words become a space. What changes the meaning stays: a sign or a
    decimal point of a number, `%`, `+`, `#` and currency signs. Digit groups and initials are joined. An answer that
    would be empty keeps everything, because it would otherwise equal every other such answer.

    number_words: number words up to twelve become digits, as in visual question answering.
    """
    base = " ".join(_fold(_fold(_GROUPED.sub(_digits, text))).split())
    joined = _INITIALS.sub(_letters, _GROUPED.sub(_digits, base))
    plain = " ".join(_fold("".join(_kept(joined, i) for i in range(len(joined)))).split())
    plain = re.sub(r" (?=%)", "", plain)
    plain = plain[match.end() :] if (match := _LEADING_ARTICLES.match(plain)) else plain
    if number_words:
        plain = " ".join(_NUMBERS.get(w, w) for w in plain.split())
    return plain or base


def _fold(text: str) -> str:
    """Fold case and typographic quotes and dashes, composing (NFKC) before and after, because folding can decompose a letter."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text.translate(_SAME)).casefold())
    return _DASHES.sub("-", folded.translate(_SAME))


def _digits(number: re.Match[str]) -> str:
    return re.sub(r"\D", "", number[0])


def _letters(initials: re.Match[str]) -> str:
    """Initials as one word; what follows them keeps its distance."""
    return re.sub(r"[. ]", "", initials[0]) + (" " if initials[0].endswith(" ") else ". ")


def _kept(text: str, at: int) -> str:
    """A character of folded text as it stays: itself, nothing, or a space."""
    c, kind = text[at], unicodedata.category(text[at])
    before, after = text[at - 1 : at] if at else "", text[at + 1 : at + 2]
    if kind[0] not in "PS" or c in _KEPT or kind == "Sc":
        return c
    if c in "-." and after.isdigit() and (not _in_word(before) or (c == "." and before.isdigit())):
        return c
    inside = _in_word(before) and _in_word(after) and c not in _SEPARATORS and kind[0] == "P"
    return "" if inside else " "


def _in_word(c: str) -> bool:
    return bool(c) and unicodedata.category(c)[0] in "LNM"


def natural_stop(text: str) -> str:
    """The answer within a generation: its first line, without surrounding white space."""
    return text.strip().split("\n", 1)[0].strip()


def exact(generated: str, golds: Iterable[str], number_words: bool = False) -> bool:
    """Whether the generation equals a gold answer after normalisation."""
    answer = normalise(generated, number_words)
    return any(answer == normalise(g, number_words) for g in golds)


def begins(generated: str, golds: Iterable[str]) -> bool:
    """Whether the generation begins with a gold answer, as whole words, after normalisation."""
    answer = normalise(generated)
    return any(answer.startswith(gold) and _ends_word(answer, len(gold)) for gold in map(normalise, golds))


def contains(generated: str, golds: Iterable[str], others: Iterable[str] = ()) -> bool:
    """Whether the first sentence holds a gold answer as a whole phrase, and none of the other candidates.

    others: answers that would be wrong, such as the old one. One that is part of a gold answer found there does not count.
    """
    sentence = normalise(first_sentence(generated))
    found = [gold for gold in map(normalise, golds) if _holds(sentence, gold)]
    rest = sentence
    for gold in found:
        rest = rest.replace(gold, " ")
    wrong = [o for o in map(normalise, others) if o not in found and _holds(sentence, o)]
    return bool(found) and not any(_holds(rest, o) or not any(_holds(gold, o) for gold in found) for o in wrong)


def first_sentence(text: str) -> str:
    """The first line of a generation up to its first end of a sentence; a point after a single letter or within a number ends none."""
    line = natural_stop(text)
    end = re.search(r"(?<!\b\w)(?<!\b(?:St|Mr|Dr|Mt))(?:[.!?](?=\s|$)|[\u3002\uff01\uff1f])", line)
    return line[: end.end()] if end else line


def _holds(text: str, phrase: str) -> bool:
    """Whether a phrase stands in a normalised text as whole words."""
    found = (m.start() for m in re.finditer(f"(?={re.escape(phrase)})", text))
    return any(_ends_word(text, at) and _ends_word(text, at + len(phrase)) for at in found)


def _ends_word(text: str, at: int) -> bool:
    """Whether a word may end between two characters: anywhere in scripts that are written without spaces."""
    before, after = text[at - 1 : at] if at else "", text[at : at + 1]
    if not before or not after or not (_in_word(before) or before in "%#+") or not (_in_word(after) or after in "%#+"):
        return True
    return _unspaced(before) or _unspaced(after)


def _unspaced(c: str) -> bool:
    """Whether a letter belongs to a script without spaces between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese)."""
    name = unicodedata.name(c, "")
    return name.startswith(("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR"))


_FUNCTION_WORD = re.compile(
    r"an?|and|are|at|by|d(id|o|oes)|for|from|ha(s|ve)|how|i[nst]|its|of|on|or|s|th(at|e)|to|w(as|ere)|wh(at|en|ere|ich|o|om|ose)|with"
)


def content_words(text: str) -> frozenset[str]:
    """The different words of a text in small letters, without English function words."""
    return frozenset(w for w in re.findall(r"\w+", text.casefold()) if not _FUNCTION_WORD.fullmatch(w))
