"""Teaching the tiny model the pre-edit beliefs of any stream, real photos included.

Starts from given weights. Photos are seen through random crops; each belief is also asked with stated
facts before it, so that editors that work through the prompt can be measured on this model too. A quarter
of the rows rehearses the simulated world.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from testbed.core.events import BadPicture, Picture, Question
from testbed.editors.retrieval import prompts
from testbed.pretraining.curriculum import Curriculum
from testbed.pretraining.evaluation import Asked
from testbed.pretraining.packing import Example, Packed, Packer
from testbed.pretraining.tiny_model import SIDE

KEPT_SIDE = 2 * SIDE
"""Photos are held in memory with this short side, in pixels."""
SMALLEST_CROP = 0.85
ROWS, LEAST_ROWS, WORLD_ROWS = 28, 4, 8
"""Rows of beliefs in a batch, the fewest about photos (or without) where there are such, and rows of rehearsal."""
PER_TEXT_ROW = 16
"""Beliefs without a photo in a row."""
PER_READING_ROW = 4
"""Questions behind stated facts in a row; each takes as much room as several beliefs."""


@dataclass(frozen=True, slots=True)
class PhotoBeliefs:
    """What is believed about one photo (uint8, short side 96); no photo for text beliefs."""

    photo: np.ndarray | None
    examples: tuple[Example, ...]


def shrink(photo: np.ndarray) -> np.ndarray:
    """uint8 (h, w, 3) with its short side at most 96 pixels, its shape kept."""
    factor = KEPT_SIDE / min(photo.shape[:2])
    if factor >= 1:
        return photo
    size = (max(KEPT_SIDE, round(photo.shape[1] * factor)), max(KEPT_SIDE, round(photo.shape[0] * factor)))
    return np.array(Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC))


def crop(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random square of 85 to 100 % of the short side, uint8 (48, 48, 3)."""
    height, width = photo.shape[:2]
    side = round(min(height, width) * rng.uniform(SMALLEST_CROP, 1.0))
    top, left = (height - side) / 2 * rng.uniform(0.5, 1.5), (width - side) / 2 * rng.uniform(0.5, 1.5)
    box = (left, top, left + side, top + side)
    return np.array(Image.fromarray(photo).resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))


def gather(beliefs: Sequence[Question]) -> tuple[list[PhotoBeliefs], list[str]]:
    """Beliefs by photo, and one line for each photo that cannot be read.

    Raises ValueError where a belief has no answer, or where two answers are given to one question.
    """
    photos: dict[str, Picture] = {}
    told: dict[str, dict[str, str]] = {}
    for q in beliefs:
        if q.answer is None:
            raise ValueError(f"belief {q.id} has no answer ({q.prompt!r}): beliefs() must say what the model answers before any edit")
        key = q.image.key if q.image is not None else ""
        if q.image is not None:
            photos[key] = q.image
        old = told.setdefault(key, {}).setdefault(q.prompt, q.answer)
        if old != q.answer:
            raise ValueError(f"beliefs give two answers to {q.prompt!r} of picture {key or 'none'}: {old!r} and {q.answer!r}")
    out, lost = [], []
    for key, answers in told.items():
        try:
            photo = shrink(photos[key].load()) if key else None
        except BadPicture as e:
            lost.append(str(e))
            continue
        out.append(PhotoBeliefs(photo, tuple(Example(p, a) for p, a in answers.items())))
    return out, lost


class Beliefs:
    """Draws training examples of beliefs.

    reading: share of the rows in words that ask behind stated facts.
    """

    def __init__(self, groups: list[PhotoBeliefs], rng: np.random.Generator, reading: float = 0.0) -> None:
        self.rng, self.reading = rng, reading
        self.pictured = [g for g in groups if g.photo is not None]
        self.told = [e for g in groups if g.photo is None for e in g.examples]
        self._all = [e for g in groups for e in g.examples]
        self._alike: dict[str, list[Example]] = defaultdict(list)
        for e in self.told:
            self._alike[_opening(e.prompt)].append(e)
        self._order: list[int] = []

    def photo_row(self) -> tuple[np.ndarray, list[Example]]:
        """A new crop of the next photo, with its beliefs in random order and one question in context."""
        if not self._order:
            self._order = [int(i) for i in self.rng.permutation(len(self.pictured))]
        group = self.pictured[self._order.pop()]
        examples = [group.examples[int(i)] for i in self.rng.permutation(len(group.examples))]
        if group.photo is None:
            raise ValueError("a pictured belief has no photo")
        return crop(group.photo, self.rng), [*examples[:3], self.in_context(examples[0]), *examples[3:]]

    def rows(self) -> tuple[int, int]:
        """Rows about photos and rows of text in a batch: as many as it takes to see all of them equally often."""
        photos, texts = len(self.pictured), len(self.told) / PER_TEXT_ROW
        if not photos or not texts:
            return (ROWS - LEAST_ROWS, 0) if photos else (0, ROWS - LEAST_ROWS)
        about_photos = round(ROWS * photos / (photos + texts))
        about_photos = min(max(about_photos, LEAST_ROWS), ROWS - LEAST_ROWS)
        return about_photos, ROWS - about_photos

    def text_row(self, n: int) -> list[Example]:
        return [self.told[int(i)] for i in self.rng.integers(0, len(self.told), n)]

    def reading_row(self) -> list[Example]:
        """Questions without a photo behind stated facts, half of which are worded like the question.

        Their answers are beliefs' answers or made of two: what a prompt says is to be copied, not chosen among what is known.
        """
        return [self.read(e) for e in self.text_row(PER_READING_ROW)]

    def read(self, asked: Example, overrides: bool | None = None) -> Example:
        """The question behind up to four facts; one of them overrides the belief or not, as drawn unless it is said."""
        pool = self._alike[_opening(asked.prompt)] if self.rng.random() < 0.5 else self._all
        others = [pool[int(i)] for i in self.rng.integers(0, len(pool), int(self.rng.integers(0, 4)))]
        return self._behind(asked, others, self._made_up, overrides)

    def in_context(self, asked: Example) -> Example:
        """The question after stated facts: one that overrides the belief, or none that bears on it."""
        overrides = self.rng.random() < 0.6
        others = [self._all[int(i)] for i in self.rng.integers(0, len(self._all), int(self.rng.integers(1, 4)))]
        return self._behind(asked, others, self._answer, overrides)

    def _behind(self, asked: Example, others: list[Example], answer: Callable[[], str], overrides: bool | None = None) -> Example:
        overrides = self.rng.random() < 0.6 if overrides is None else overrides
        stated = {e.prompt: answer() for e in others if e.prompt != asked.prompt}
        if overrides:
            stated[asked.prompt] = answer()
        keys = list(stated)
        order = [keys[int(i)] for i in self.rng.permutation(len(keys))]
        facts = [prompts.statement(p, stated[p]) for p in order]
        if self.rng.random() < 0.3 and facts:
            return Example(prompts.which_fact(facts, asked.prompt), stated[asked.prompt] if overrides else prompts.NONE)
        return Example(prompts.in_context(facts, asked.prompt), stated[asked.prompt] if overrides else asked.answer)

    def _made_up(self) -> str:
        """A belief's answer, or the beginning of one and the end of another."""
        first, second = self._answer(), self._answer()
        if self.rng.random() < 0.5:
            return first
        return " ".join([*first.split()[:1], *second.split()[-1:]]) or first

    def _answer(self) -> str:
        return self._all[int(self.rng.integers(len(self._all)))].answer or ""


def reading_questions(beliefs: Beliefs, n: int) -> list[Asked]:
    """n questions in words as gate questions, each behind facts of which one overrides the belief."""
    return [Asked(e.prompt, e.answer or "", None) for e in (beliefs.read(asked, overrides=True) for asked in beliefs.text_row(n))]


def _opening(prompt: str) -> str:
    """The first two words: questions that begin alike mostly ask alike."""
    return " ".join(prompt.split()[:2])


def belief_batches(beliefs: Beliefs, packer: Packer, world: Curriculum | None) -> Callable[[float], Packed]:
    """A maker of batches of beliefs, with rehearsal of the simulated world where one is given."""
    texts = world.text() if world is not None else iter(())
    if world is not None:
        world.progress = 1.0
    about_photos, in_words = beliefs.rows()

    def batch(progress: float) -> Packed:
        rows = [packer.row(examples, photo) for photo, examples in (beliefs.photo_row() for _ in range(about_photos))]
        reading = round(beliefs.reading * in_words)
        rows += [packer.row(beliefs.text_row(PER_TEXT_ROW)) for _ in range(in_words - reading)]
        rows += [packer.row(beliefs.reading_row()) for _ in range(reading)]
        if world is not None:
            rows += [packer.row([next(texts) for _ in range(16)]) for _ in range(WORLD_ROWS // 4)]
            rows += [packer.row(examples, photo) for photo, examples in (world.photo() for _ in range(WORLD_ROWS // 4))]
            for i in range(WORLD_ROWS // 2):
                photo, shared, examples = world.context(by_picture=i % 2 == 0)
                rows.append(packer.row(examples, photo, shared))
        return packer.batch(rows)

    return batch


def belief_texts(groups: list[PhotoBeliefs]) -> list[str]:
    """Prompts and answers as they come after a space or a picture; answers weigh eight times."""
    examples = [e for g in groups for e in g.examples]
    return [f"{lead}{e.prompt}" for e in examples for lead in (" ", "\n")] + [f" {e.answer}" for e in examples for _ in range(8)]


def belief_questions(groups: list[PhotoBeliefs], rng: np.random.Generator) -> list[Asked]:
    """Every belief as a gate question, each pictured one of a new crop."""
    return [Asked(e.prompt, e.answer or "", None if g.photo is None else crop(g.photo, rng)) for g in groups for e in g.examples]
