"""The wording in which facts are put before a model. Data shared by the retrieval editors and `pretrain`.

The tiny model is trained on exactly these forms, so changing one moves numbers.
"""

from __future__ import annotations

CONTEXT = "Facts: {facts} Question: {prompt}"
"""A question with facts before it; the facts override what the model learned."""

SELECT = "Facts: {facts} Which fact answers: {prompt}"
"""Asks which of the facts bears on the question; the answer names it by its target, or is NONE."""

NONE = "none"


def statement(prompt: str, target: str) -> str:
    """A fact as one sentence: the edit's prompt followed by its target, ended by a full stop."""
    return f"{prompt} {target}."


def numbered(facts: list[str]) -> str:
    """Facts as "1) ... 2) ..."."""
    return " ".join(f"{i}) {fact}" for i, fact in enumerate(facts, 1))


def in_context(facts: list[str], prompt: str) -> str:
    """The question with the facts before it; the question itself when there is none."""
    return CONTEXT.format(facts=numbered(facts), prompt=prompt) if facts else prompt


def which_fact(facts: list[str], prompt: str) -> str:
    """The question which of the facts bears on `prompt`."""
    return SELECT.format(facts=numbered(facts), prompt=prompt)


def named(answer: str, targets: list[str]) -> int | None:
    """Index of the fact that an answer to SELECT names: by its target, or by its number as numbered above.

    None where it names none of them. Of facts with one target the first is meant: they answer alike.
    """
    said = answer.strip().rstrip(".").casefold()
    for i, target in enumerate(targets):
        if said == target.strip().rstrip(".").casefold():
            return i
    digits = said.removeprefix("fact").strip().rstrip(")")
    return int(digits) - 1 if digits.isascii() and digits.isdigit() and 1 <= int(digits) <= len(targets) else None
