"""The wording in which facts are put before a model. Data shared by the retrieval editors and `pretrain`.

The tiny model is trained on exactly the forms of "plain", so changing one moves numbers. The other wordings are
for models that follow instructions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

CONTEXT = "Facts: {facts} Question: {prompt}"
"""A question with facts before it; the facts override what the model learned."""

SELECT = "Facts: {facts} Which fact answers: {prompt}"
"""Asks which of the facts bears on the question; the answer names it by its target, or is NONE."""

NONE = "none"

REWRITE = "Facts: {facts} Answer: {answer} Rewrite for: {prompt}"
"""Asks a post-editor for the answer as it is with the fact; it says RETAIN where the fact does not bear on the question."""

RETAIN = "retain"


@dataclass(frozen=True)
class Wording:
    """How facts are put before a model and how it is asked which of them bears.

    `{facts}` and `{prompt}` mark where facts and question go; where they occur in a fact or a question they are text.
    """

    context: str
    """A question with facts before it."""
    select: str
    """Asks which of the numbered facts bears on the question."""
    none: str
    """The answer that none does."""
    by_number: bool = True
    """A fact is named by its number, else by its target."""
    most: int = 5
    """Facts among which the model is to tell the bearing one (He et al. 2025: 5; the tiny model was trained with up to 4)."""


WORDINGS: dict[str, Wording] = {
    "plain": Wording(CONTEXT, SELECT, NONE, by_number=False, most=4),
    "instructed": Wording(
        "Treat this as true: {facts} Answer in as few words as possible. {prompt}",
        "Statements: {facts} Question: {prompt} Which statement, if any, says what the question asks for? Reply with its number, or 0.",
        "0",
    ),
    "instructed-2": Wording(
        "The following has changed and now holds: {facts} Taking it into account, answer briefly: {prompt}",
        "Here are facts that changed: {facts} Give the number of the one that is needed to answer {prompt} Give 0 if none is needed.",
        "0",
    ),
}
"""By name. What a wording does to scores is measured by running both of a kind."""
_NUMBER = re.compile(r"(?:fact|statement|number)?\s*(\d+)(?:[).:].*)?", re.DOTALL)


def statement(prompt: str, target: str) -> str:
    """A fact as one sentence: the edit's prompt followed by its target, ended by a full stop."""
    return f"{prompt} {target}."


def numbered(facts: list[str]) -> str:
    """Facts as "1) ... 2) ..."."""
    return " ".join(f"{i}) {fact}" for i, fact in enumerate(facts, 1))


def in_context(facts: list[str], prompt: str, wording: Wording = WORDINGS["plain"]) -> str:
    """The question with the facts before it; the question itself when there is none."""
    return wording.context.format(facts=numbered(facts), prompt=prompt) if facts else prompt


def which_fact(facts: list[str], prompt: str, wording: Wording = WORDINGS["plain"]) -> str:
    """The question which of the facts bears on `prompt`."""
    return wording.select.format(facts=numbered(facts), prompt=prompt)


def rewrite(fact: str, prompt: str, answer: str) -> str:
    """The request to a post-editor to bring an answer into line with a fact."""
    return REWRITE.format(facts=numbered([fact]), prompt=prompt, answer=answer)


def options(targets: list[str], wording: Wording) -> list[str]:
    """What a model may answer to `which_fact`: one option a fact, and last the one for none of them."""
    return [*(map(str, range(1, len(targets) + 1)) if wording.by_number else targets), wording.none]


def named(answer: str, targets: list[str]) -> int | None:
    """Index of the fact that an answer to SELECT names: by its target, or by its number as numbered above.

    None where it names none of them. Of facts with one target the first is meant: they answer alike.
    """
    said = answer.strip().rstrip(".").casefold()
    for i, target in enumerate(targets):
        if said == target.strip().rstrip(".").casefold():
            return i
    number = _NUMBER.fullmatch(said)
    digits = number[1] if number else ""
    return int(digits) - 1 if digits.isascii() and digits.isdigit() and 1 <= int(digits) <= len(targets) else None
