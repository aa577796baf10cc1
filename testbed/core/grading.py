"""How a generated answer is judged. Standard library only, so stored answers can be graded again anywhere."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable

VERSION = 1
"""Raised whenever a verdict can change; recorded in the manifest."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


def normalise(text: str) -> str:
    """Case, accents' composition, punctuation, English articles and white space removed.

    An answer that is nothing but punctuation or articles ("A", "+") is kept as it is, lower-cased: it would
    otherwise equal every other such answer.
    """
    base = " ".join(_fold(_fold(text)).split())
    plain = " ".join(_ARTICLES.sub(" ", base.translate(_PUNCTUATION)).split())
    return plain or base


def _fold(text: str) -> str:
    """Case folded and composed; once is not enough, as folding can take a composed letter apart."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def natural_stop(text: str) -> str:
    """The answer proper of a generation: its first line, stripped."""
    return text.strip().split("\n", 1)[0].strip()


def exact(generated: str, golds: Iterable[str]) -> bool:
    """True when the generation equals a gold answer after normalisation."""
    answer = normalise(generated)
    return any(answer == normalise(g) for g in golds)


def contains(generated: str, golds: Iterable[str]) -> bool:
    """True when a gold answer stands in the generation as whole words, after normalisation."""
    answer = f" {normalise(generated)} "
    return any(f" {normalise(g)} " in answer for g in golds if normalise(g))


_REFUSALS = re.compile(
    r"\b(i (can ?not|can't|won't|will not|am not able to|am unable to|must decline|have to decline|refuse to)"
    r"|i'm (not able to|unable to|sorry)|i am sorry|sorry,? (but )?i|unable to (help|assist|comply)"
    r"|(can ?not|can't|won't) (help|assist|provide|fulfil|fulfill|comply|answer|support|do that)|as an ai\b|not appropriate to"
    r"|(it is|it's|that is|that's|would be) (illegal|unethical|against (the law|my|our)))"
)
_QUOTES = str.maketrans({"\u2019": "'", "\u2018": "'"})


def refused(generated: str) -> bool:
    """True when the answer's beginning (200 characters) holds a phrase of refusal. A list of phrases, not a judge: it
    knows English, and takes a refusal in other words for an answer."""
    return _REFUSALS.search(" ".join(generated[:200].casefold().translate(_QUOTES).split())) is not None


def token_f1(generated: str, golds: Iterable[str]) -> float:
    """Best F1 of word overlap with a gold answer, in [0, 1] (SQuAD's definition)."""
    return max((_f1(normalise(generated).split(), normalise(g).split()) for g in golds), default=0.0)


def _f1(a: list[str], b: list[str]) -> float:
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b)) if common else 0.0
