"""Edits for methods that learn to edit, from the records of a source that no run edits or asks about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from streams.base import TrainEdit
from streams.files.entry import EntryQuestion, FactEntry
from streams.files.pictures import AnyPicture
from streams.files.records import normalize
from streams.files.subjects import MAX_WORDS
from testbed.core.events import Ask, EditEvent, Question

OwnQuestions = Callable[[FactEntry], Iterable[EntryQuestion]]


@dataclass
class InUse:
    """What the other records of a source are about: the names of their subjects, their pictures, and their prompts without one."""

    subjects: set[str] = field(default_factory=set[str])
    pictures: set[str] = field(default_factory=set[str])
    prompts: set[str] = field(default_factory=set[str])

    def add(self, entry: FactEntry, own: Iterable[EntryQuestion]) -> None:
        """Count a record in, with every question about it."""
        if entry.subject:
            self.subjects.add(normalize(entry.subject))
        asked = [(entry.image, p) for p in (entry.prompt, *entry.held_out, *entry.train)] + [(q.image, q.prompt) for q in own]
        for image, prompt in asked:
            if image is not None:
                self.pictures.add(image.name)
            else:
                self.prompts.add(normalize(prompt))

    def has(self, prompt: str, image: AnyPicture | None, subject: str | None = None) -> bool:
        """Whether a question shows a picture in use or, without a picture, is in use itself, or names a subject in use."""
        if (subject and normalize(subject) in self.subjects) or (image is not None and image.name in self.pictures):
            return True
        words = normalize(prompt).split()
        spans = (" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, min(i + MAX_WORDS, len(words)) + 1))
        return (image is None and normalize(prompt) in self.prompts) or any(span in self.subjects for span in spans)


def train_edits(entries: Sequence[FactEntry], own: OwnQuestions) -> Iterator[TrainEdit]:
    """The records that are set aside for training, as edits.

    A record is left out whose subject, picture or prompt another record has too, and of the others each question that has one.
    """
    in_use = InUse()
    for e in entries:
        if e.role != "train":
            in_use.add(e, own(e))
    for e in entries:
        changes = e.previous and normalize(e.target) != normalize(e.previous)
        if e.role == "train" and changes and not in_use.has(e.prompt, e.image, e.subject):
            yield _train_edit(e, [q for q in own(e) if not in_use.has(q.prompt, q.image)], in_use)


def _train_edit(e: FactEntry, questions: Sequence[EntryQuestion], in_use: InUse) -> TrainEdit:
    prompts = [p for p in (*e.train, *e.held_out) if not in_use.has(p, e.image)]
    reworded = [Ask(p, e.image, relation=e.relation) for p in prompts]
    reworded += [Ask(q.prompt, q.image, relation=e.relation) for q in questions if q.split.endswith("_generality") and q.answer is None]
    stay = tuple(
        Question(q.split, q.prompt, q.answer, image=q.image, aliases=q.aliases, topic=e.relation) for q in questions if q.is_locality
    )
    event = EditEvent("add", 0.0, 0, e.prompt, e.target, e.image, e.previous, e.subject, e.relation, source=e.source)
    return TrainEdit(event, tuple(reworded), stay)
