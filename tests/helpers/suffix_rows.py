"""Rows of prompts, pictures and answers for the tests of partial forwards."""

from __future__ import annotations

from testbed.core.events import Ask
from tests.helpers.models import TEXT, Noise

PROMPTS = ("who?", "what colour is the ship in the northern harbour?", "who leads the bridge?")


ANSWERS = ["green", "Mara Venn", "two red towers"]


def asks(kind: str) -> list[Ask]:
    pictures = [None, None, None] if kind in TEXT else [Noise(1), None, Noise(2, 32, 64)]
    return [Ask(p, x) for p, x in zip(PROMPTS, pictures)]
