# pyright: strict
"""How a generated answer is judged. It needs the standard library only, so stored answers can be graded again anywhere."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable

VERSION = 1
"""Incremented whenever a verdict can change; the manifest records it."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))


def normalise(text: str) -> str:
    """The text in lower case and NFKC, without punctuation, English articles and extra white space.

    An answer of punctuation or articles alone ("A", "+") keeps them, because it would otherwise equal every other such
    answer.
    """
    base = " ".join(_fold(_fold(text)).split())
    plain = " ".join(_ARTICLES.sub(" ", base.translate(_PUNCTUATION)).split())
    return plain or base


def _fold(text: str) -> str:
    """Fold case, composing (NFKC) before and after, because folding can decompose a composed letter."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def natural_stop(text: str) -> str:
    """The answer within a generation: its first line, without surrounding white space."""
    return text.strip().split("\n", 1)[0].strip()


def exact(generated: str, golds: Iterable[str]) -> bool:
    """True when the generation equals a gold answer after normalisation."""
    answer = normalise(generated)
    return any(answer == normalise(g) for g in golds)


_REFUSALS = re.compile(
    r"\b(i (can ?not|can't|won't|will not|am not able to|am unable to|must decline|have to decline|refuse to)"
    r"|i'm (not able to|unable to|sorry)|i am sorry|sorry,? (but )?i|unable to (help|assist|comply)"
    r"|(can ?not|can't|won't) (help|assist|provide|fulfil|fulfill|comply|answer|support|do that)|as an ai\b|not appropriate to"
    r"|(it is|it's|that is|that's|would be) (illegal|unethical|against (the law|my|our)))"
)
_QUOTES = str.maketrans({"\u2019": "'", "\u2018": "'"})


def refused(generated: str) -> bool:
    """True when the first 200 characters contain an English phrase of refusal.

    A list of phrases is no judge: a refusal in other words counts as an answer.
    """
    return _REFUSALS.search(" ".join(generated[:200].casefold().translate(_QUOTES).split())) is not None
