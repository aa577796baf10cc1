"""Facts, a train pool and editors for the tests of locate-then-edit methods."""

from __future__ import annotations

from typing import Any

from streams.base import TrainEdit, TrainPool
from testbed.core.events import Ask, EditEvent, Question
from testbed.core.registry import EDITORS
from testbed.editors.base import Editor
from testbed.editors.hyperparameters import filled
from testbed.editors.locate.core import DEFAULTS, LocateConfig
from testbed.editors.locate.targets import TargetTask
from tests.helpers.models import Noise, build

METHODS = ("rome", "memit", "memit-seq", "alphaedit", "emmet", "pmet")
SMALL = filled(LocateConfig(layers=(0, 1), steps=6, lr=0.5, clamp=2.0, kl=0.1, relative=True), DEFAULTS)
TEXTS = tuple(f"the small lamp number {i} stands beside the river and the old bridge" for i in range(40))
POOL = TrainPool((Question("general", "what colour is the lamp?", "red", topic="x"),), TEXTS)


def fact(subject: str, target: str, picture: int | None = None, **more: Any) -> EditEvent:
    image = None if picture is None else Noise(picture)
    return EditEvent("add", 1.0, 0, f"Who leads {subject} now?", target, image, subject=subject, relation="head", **more)


FACTS = [fact("the northern harbour", "Mara Venn"), fact("Zor", "two red towers"), fact("the old bridge", "green")]


def train_edit(n: int) -> TrainEdit:
    """An edit of one of many entities, with a rephrasing and a question whose answer stays."""
    event = fact(f"harbour {n}", ("green", "Mara Venn", "two red towers")[n % 3])
    beside = Question("locality_hard", f"what colour is lamp {n}?", "blue", topic="x")
    return TrainEdit(event, (Ask(f"Name the head of harbour {n}."),), (beside,))


META_POOL = TrainPool(POOL.questions, TEXTS, lambda: tuple(map(train_edit, range(12))))
"""The pool with edits for methods that learn to edit."""


def make(name: str, kind: str = "llama", pool: TrainPool = POOL, **config: Any) -> Editor:
    cls = EDITORS.get(name)
    settings = {"contexts": 1, "steps": 6, **config}
    editor = cls(cls.Config(**settings))
    editor.prepare(build(kind), pool)
    return editor


def task(
    kind: str = "llama", events: list[EditEvent] = FACTS, layer: int = 1, contexts: tuple[str, ...] = ("", "So it goes")
) -> TargetTask:
    return TargetTask(build(kind), events, layer, contexts)
