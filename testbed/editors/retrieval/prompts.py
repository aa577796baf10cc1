"""Prompt templates that put facts before a question. The retrieval editors and `testbed.pretraining` share them.

The tiny model is trained on exactly the template "plain", so changing it moves numbers. The other templates are
for models that follow instructions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

CONTEXT = "Facts: {facts} Question: {prompt}"
"""A question with facts before it; the facts override what the model learned."""

SELECT = "Facts: {facts} Which fact answers: {prompt}"
"""Asks which of the facts answers the question; the reply is that fact's target, or NONE."""

NONE = "none"

REWRITE = "Facts: {facts} Answer: {answer} Rewrite for: {prompt}"
"""Asks a post-editor for the answer that agrees with the fact; it replies RETAIN where the fact does not concern the question."""

RETAIN = "retain"


@dataclass(frozen=True)
class PromptTemplate:
    """The texts that put facts before a question and that ask a model which fact answers a question.

    `{facts}` and `{prompt}` mark the places of facts and question. Inside a fact or a question these marks are plain text.
    """

    context: str
    """A question with facts before it."""
    select: str
    """Asks which of the numbered facts answers the question."""
    none: str
    """The reply that no fact does."""
    by_number: bool = True
    """Whether the reply names a fact by its number; otherwise it names it by its target."""
    max_facts: int = 5
    """Facts that the model chooses among (5 in the released SCR code; the tiny model was trained with up to 4)."""


TEMPLATES: dict[str, PromptTemplate] = {
    "plain": PromptTemplate(CONTEXT, SELECT, NONE, by_number=False, max_facts=4),
    "instructed": PromptTemplate(
        "Treat this as true: {facts} Answer in as few words as possible. {prompt}",
        "Statements: {facts} Question: {prompt} Which statement, if any, says what the question asks for? Reply with its number, or 0.",
        "0",
    ),
    "instructed-2": PromptTemplate(
        "The following has changed and now holds: {facts} Taking it into account, answer briefly: {prompt}",
        "Here are facts that changed: {facts} Give the number of the one that is needed to answer {prompt} Give 0 if none is needed.",
        "0",
    ),
}
"""Prompt templates by name. There are two for instructed models, so that a run with each shows what the template does to scores."""
_WORDS = ("fact", "statement", "number")
_NUMBER = re.compile(rf"(?:{'|'.join(_WORDS)})?\s*(\d+)(?:[).:].*)?", re.DOTALL)
_BEGUN_NUMBER = re.compile(rf"(?:{'|'.join(_WORDS)})?\s*0*(\d*)\s*")


def statement(prompt: str, target: str) -> str:
    """A fact as one sentence: the edit's prompt followed by its target, ended by a full stop."""
    return f"{prompt} {target}."


def numbered(facts: list[str]) -> str:
    """The facts as one text, "1) ... 2) ..."."""
    return " ".join(f"{i}) {fact}" for i, fact in enumerate(facts, 1))


def in_context(facts: list[str], prompt: str, template: PromptTemplate = TEMPLATES["plain"]) -> str:
    """The question with the facts before it; the question itself when there is none."""
    return template.context.format(facts=numbered(facts), prompt=prompt) if facts else prompt


def which_fact(facts: list[str], prompt: str, template: PromptTemplate = TEMPLATES["plain"]) -> str:
    """The request to name the fact that answers `prompt`."""
    return template.select.format(facts=numbered(facts), prompt=prompt)


def rewrite(fact: str, prompt: str, answer: str) -> str:
    """The request to a post-editor to bring an answer into line with a fact."""
    return REWRITE.format(facts=numbered([fact]), prompt=prompt, answer=answer)


def options(targets: list[str], template: PromptTemplate) -> list[str]:
    """The replies to `which_fact` that are allowed: one for each fact, and last the one that no fact answers the question."""
    return [*(map(str, range(1, len(targets) + 1)) if template.by_number else targets), template.none]


def named_fact(answer: str, targets: list[str]) -> int | None:
    """Index of the fact that a reply to `which_fact` names by its target or by its number; None where it names no fact.

    Of several facts with the same target it is the first, because they give the same answer.
    """
    said = answer.strip().rstrip(".").casefold()
    for i, target in enumerate(targets):
        if said == target.strip().rstrip(".").casefold():
            return i
    number = _NUMBER.fullmatch(said)
    digits = number[1] if number else ""
    return int(digits) - 1 if digits.isascii() and digits.isdigit() and 1 <= int(digits) <= len(targets) else None


def decided(reply: str, targets: list[str]) -> bool:
    """Whether `named_fact` of a reply to `which_fact` is known from its beginning, whatever follows."""
    said = reply.rstrip("\ufffd").lstrip().casefold()  # a cut character is decoded as this mark
    begun = _BEGUN_NUMBER.fullmatch(said)
    by_number = begun is not None and any(str(i + 1).startswith(begun[1]) for i in range(len(targets)))
    if by_number or any(w.startswith(said) for w in _WORDS):
        return False
    return not any(_may_become(said, t.strip().rstrip(".").casefold()) for t in targets)


def _may_become(said: str, target: str) -> bool:
    """Whether a text that begins so may be the target, with full stops or white space behind it."""
    more = said.removeprefix(target)
    return target.startswith(said) or (said.startswith(target) and all(c == "." or c.isspace() for c in more))
