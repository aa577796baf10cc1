"""Training examples of the pre-edit beliefs of a stream: the answers that a model must give before the first edit.

Photos are shown in random crops. Each belief is also asked after stated facts, so that editors that work through the
prompt can be measured on the trained model too. A quarter of the rows rehearses the simulated world.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from testbed.core.events import BadPicture, Picture, Question
from testbed.editors.retrieval import prompts
from testbed.pretraining.curriculum import Curriculum, pick, shuffled, shuffled_rounds
from testbed.pretraining.packing import Example, PackedBatch, Packer
from testbed.pretraining.tiny_model import SIDE

KEPT_SIDE = 2 * SIDE
"""Short side of the photos held in memory, in pixels."""
SMALLEST_CROP = 0.85
ROWS, LEAST_ROWS, WORLD_ROWS = 28, 4, 8
"""Belief rows of a batch, the fewest with photos (or without) where there are such beliefs, and rows of rehearsal."""
PER_TEXT_ROW = 16
"""Beliefs without a photo in a row."""
PER_READING_ROW = 4
"""Questions after stated facts in a row; each takes as many tokens as several beliefs."""


@dataclass(frozen=True, slots=True)
class PhotoBeliefs:
    """The beliefs about one photo (uint8, short side at most 96); the photo is None for beliefs without one."""

    photo: np.ndarray | None
    examples: tuple[Example, ...]


def shrink(photo: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) with a short side of at most 96 pixels and the same aspect ratio."""
    factor = KEPT_SIDE / min(photo.shape[:2])
    if factor >= 1:
        return photo
    size = (max(KEPT_SIDE, round(photo.shape[1] * factor)), max(KEPT_SIDE, round(photo.shape[0] * factor)))
    return np.array(Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC))


def crop(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random square of 85 to 100 % of the short side, resized to uint8 (48, 48, 3)."""
    height, width = photo.shape[:2]
    side = round(min(height, width) * rng.uniform(SMALLEST_CROP, 1.0))
    top, left = (height - side) / 2 * rng.uniform(0.5, 1.5), (width - side) / 2 * rng.uniform(0.5, 1.5)
    box = (left, top, left + side, top + side)
    return np.array(Image.fromarray(photo).resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))


def gather(beliefs: Sequence[Question]) -> tuple[list[PhotoBeliefs], list[str]]:
    """(beliefs by photo, a line for each photo that cannot be read).

    Raises ValueError where a belief has no answer, or where one question has two answers.
    """
    photos: dict[str, Picture] = {}
    answers: dict[str, dict[str, str]] = {}
    for q in beliefs:
        if q.answer is None:
            raise ValueError(f"belief {q.id} has no answer ({q.prompt!r}): beliefs() must say what the model answers before any edit")
        key = q.image.key if q.image is not None else ""
        if q.image is not None:
            photos[key] = q.image
        old = answers.setdefault(key, {}).setdefault(q.prompt, q.answer)
        if old != q.answer:
            raise ValueError(f"beliefs give two answers to {q.prompt!r} of picture {key or 'none'}: {old!r} and {q.answer!r}")
    out, unreadable = [], []
    for key, by_prompt in answers.items():
        try:
            photo = shrink(photos[key].load()) if key else None
        except BadPicture as e:
            unreadable.append(str(e))
            continue
        out.append(PhotoBeliefs(photo, tuple(Example(p, a) for p, a in by_prompt.items())))
    return out, unreadable


class BeliefExamples:
    """Draws training examples of beliefs.

    Args:
        groups: the beliefs by photo.
        rng: generator of every draw.
        reading: share of the rows without a photo whose questions follow stated facts.
    """

    def __init__(self, groups: list[PhotoBeliefs], rng: np.random.Generator, reading: float = 0.0) -> None:
        self.rng, self.reading = rng, reading
        self.with_photo = [(g.photo, g.examples) for g in groups if g.photo is not None]
        self.text_only = [e for g in groups if g.photo is None for e in g.examples]
        self._all = [e for g in groups for e in g.examples]
        self._same_opening: dict[str, list[Example]] = defaultdict(list)
        for e in self.text_only:
            self._same_opening[_opening(e.prompt)].append(e)
        self._rounds = shuffled_rounds(self.with_photo, rng)

    def photo_row(self) -> tuple[list[Example], np.ndarray]:
        """The beliefs about the next photo in random order, with one of them after stated facts, and a new crop of the photo."""
        photo, beliefs = next(self._rounds)
        examples = shuffled(beliefs, self.rng)
        cropped = crop(photo, self.rng)
        return [*examples[:3], self.in_context(examples[0]), *examples[3:]], cropped

    def rows(self) -> tuple[int, int]:
        """(rows with a photo, rows without) of a batch, so that all beliefs are seen about equally often."""
        photos, texts = len(self.with_photo), len(self.text_only) / PER_TEXT_ROW
        if not photos or not texts:
            return (ROWS - LEAST_ROWS, 0) if photos else (0, ROWS - LEAST_ROWS)
        with_photo = min(max(round(ROWS * photos / (photos + texts)), LEAST_ROWS), ROWS - LEAST_ROWS)
        return with_photo, ROWS - with_photo

    def text_row(self, n: int) -> list[Example]:
        """n beliefs without a photo."""
        return self._draw(self.text_only, n)

    def reading_row(self) -> list[Example]:
        """Questions without a photo after stated facts, half of which begin like the question.

        The stated values are answers of beliefs or are made of two of them, because a model that reads must copy any
        value from the prompt and not choose among values that it knows.
        """
        return [self.after_facts(e) for e in self.text_row(PER_READING_ROW)]

    def after_facts(self, asked: Example, overrides: bool | None = None) -> Example:
        """The question after up to four facts. `overrides`: whether one of them overrides the belief; None draws it."""
        pool = self._same_opening[_opening(asked.prompt)] if self.rng.random() < 0.5 else self._all
        return self._after(asked, self._draw(pool, int(self.rng.integers(0, 4))), self._new_value, overrides)

    def in_context(self, asked: Example) -> Example:
        """The question after stated facts, of which one overrides the belief or none is relevant to it."""
        overrides = self.rng.random() < 0.6
        return self._after(asked, self._draw(self._all, int(self.rng.integers(1, 4))), self._answer, overrides)

    def _after(self, asked: Example, others: list[Example], value: Callable[[], str], overrides: bool | None = None) -> Example:
        overrides = self.rng.random() < 0.6 if overrides is None else overrides
        stated = {e.prompt: value() for e in others if e.prompt != asked.prompt}
        if overrides:
            stated[asked.prompt] = value()
        facts = [prompts.statement(*fact) for fact in shuffled(list(stated.items()), self.rng)]
        if self.rng.random() < 0.3 and facts:
            return Example(prompts.which_fact(facts, asked.prompt), stated[asked.prompt] if overrides else prompts.NONE)
        return Example(prompts.in_context(facts, asked.prompt), stated[asked.prompt] if overrides else asked.answer)

    def _draw(self, pool: list[Example], n: int) -> list[Example]:
        return [pool[int(i)] for i in self.rng.integers(0, len(pool), n)]

    def _new_value(self) -> str:
        """A belief's answer, or the first word of one and the last word of another."""
        first, second = self._answer(), self._answer()
        if self.rng.random() < 0.5:
            return first
        return " ".join([*first.split()[:1], *second.split()[-1:]]) or first

    def _answer(self) -> str:
        return pick(self._all, self.rng).answer or ""


def _opening(prompt: str) -> str:
    """The first two words, because questions that begin alike mostly ask alike."""
    return " ".join(prompt.split()[:2])


def belief_batches(examples: BeliefExamples, packer: Packer, world: Curriculum | None) -> Callable[[float], PackedBatch]:
    """A function that draws a batch of beliefs, with rehearsal of the simulated world where one is given."""
    texts = world.text() if world is not None else iter(())
    if world is not None:
        world.progress = 1.0
    with_photo, without = examples.rows()

    def batch(progress: float) -> PackedBatch:
        rows = [packer.row(*examples.photo_row()) for _ in range(with_photo)]
        reading = round(examples.reading * without)
        rows += [packer.row(examples.text_row(PER_TEXT_ROW)) for _ in range(without - reading)]
        rows += [packer.row(examples.reading_row()) for _ in range(reading)]
        if world is not None:
            rows += [packer.row([next(texts) for _ in range(16)]) for _ in range(WORLD_ROWS // 4)]
            rows += [packer.row(*world.photo()) for _ in range(WORLD_ROWS // 4)]
            rows += [packer.row(*world.context(by_picture=i % 2 == 0)) for i in range(WORLD_ROWS // 2)]
        return packer.batch(rows)

    return batch


def belief_texts(groups: list[PhotoBeliefs]) -> list[str]:
    """Texts to extend the tokenizer by: prompts as they follow a space or a picture, and answers with a weight of eight."""
    examples = [e for g in groups for e in g.examples]
    return [f"{lead}{e.prompt}" for e in examples for lead in (" ", "\n")] + [f" {e.answer}" for e in examples for _ in range(8)]


def belief_questions(groups: list[PhotoBeliefs], rng: np.random.Generator) -> list[Example]:
    """Every belief as a question, those with a photo with a new crop."""
    return [e if g.photo is None else replace(e, photo=crop(g.photo, rng)) for g in groups for e in g.examples]
