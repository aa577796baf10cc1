"""Facts, questions and answers for the tests of the retrieval editors."""

from __future__ import annotations

import numpy as np

from streams.base import TrainPool
from testbed.core.events import Ask, EditEvent, Question
from testbed.model.predictor import ModelPredictor, Response
from tests.helpers.models import Noise, build

NAMES = ["the northern harbour", "the old bridge", "the green lamp", "the small river", "the blue square"]


TARGETS = ["Mara Venn", "red towers", "ship", "green", "two stars"]


def fact(i: int, target: str = "", revises: str | None = None, picture: int | None = None, name: str = "") -> EditEvent:
    kind = "revise" if revises else "add"
    image = None if picture is None else Noise(picture)
    return EditEvent(kind, 1.0, i, f"Who leads {name or NAMES[i % 5]}?", target or TARGETS[i % 5], image, revises=revises, source=str(i))


FACTS = [fact(i) for i in range(5)]


POOL = TrainPool(tuple(Question("general", f"What colour is thing {i} beside the lamp?", "red", topic="x") for i in range(20)))


UNRELATED = [Ask("How many yellow circles?"), Ask("what colour is the ship")]


def same_responses(a: list[Response], b: list[Response]) -> bool:
    return all(
        x.generated == y.generated and x.score and y.score and np.array_equal(x.score.logprobs, y.score.logprobs)
        for x, y in zip(a, b, strict=True)
    )


def base_responses(asks: list[Ask], kind: str = "llama") -> list[Response]:
    return ModelPredictor(build(kind)).respond(asks, ["green"] * len(asks), 4)


def ask_about(e: EditEvent, told: bool = False) -> Ask:
    return Ask(e.prompt, e.image, e.target if told else None, e.id if told else None)
