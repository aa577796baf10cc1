"""Find the subject of a question by comparing many questions, for sources that do not name it.

"What university did Watts Humphrey attend?" shares "What university did ... attend?" with other questions, so
the words between are its subject. Used for zsRE files without a subject field; editors that look for the
subject in the prompt need it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

MAX_WORDS = 8
"""Longest subject, in words."""
_WORD = re.compile(r"\S+")
_TAIL = ",.?!:;"

Frame = tuple[str, str]
Span = tuple[int, int]


def subjects(questions: Sequence[str]) -> list[tuple[str, str] | None]:
    """For each question (subject, frame with "{}" in its place); None where no word after the first looks like a name.

    Candidates begin with a capital or a digit. Of the frames they leave, those shared by three questions come
    first, then those whose span also ends like a name; among these the frame wins that many questions share
    and that says much (questions times words squared). Where none is shared the longest name is taken.
    """
    seen: Counter[Frame] = Counter(frame for q in set(questions) for _, frame in _candidates(q))
    return [_best(q, seen) for q in questions]


def _best(question: str, seen: Counter[Frame]) -> tuple[str, str] | None:
    found = list(_candidates(question))
    if not found:
        return None
    named = [c for c in found if _is_name(question[slice(*c[0])].split()[-1])]
    for group in (named, found):
        shared = [(span, frame) for span, frame in group if seen[frame] >= 3]
        if shared:
            span, frame = max(shared, key=lambda c: (seen[c[1]] * _words(c[1]) ** 2, -c[0][0], c[0][1]))
            break
    else:
        span, frame = max(named or found, key=lambda c: (c[0][1] - c[0][0], -c[0][0]))
    return question[slice(*span)], f"{frame[0]}{{}}{frame[1]}"


def _words(frame: Frame) -> int:
    return len(frame[0].split()) + len(frame[1].split())


def _is_name(word: str) -> bool:
    first = word.lstrip("\"'(“‘")[:1]
    return first.isupper() or first.isdigit() or not first.isascii()


def _candidates(question: str) -> Iterator[tuple[Span, Frame]]:
    """Spans of whole words that may be a name and do not begin the question, with what they leave."""
    words = [m.span() for m in _WORD.finditer(question)]
    for i, (start, first) in enumerate(words[1:], 1):
        if not _is_name(question[start:first]):
            continue
        for _, stop in words[i : i + MAX_WORDS]:
            whole = question[start:stop]
            bare = whole.rstrip(_TAIL).removesuffix("'s").removesuffix("’s")
            for text in {bare: 0, whole: 0} if whole.endswith(".") else (bare,):  # "Jr." is a name's own point
                if text:
                    yield (start, start + len(text)), (question[:start], question[start + len(text) :])
