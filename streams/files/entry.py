"""What a usable record of any source is, which records are never edited, and how questions are collected."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from streams.base import Skipped
from streams.files.pictures import Shown
from streams.files.records import plain
from streams.transforms import share
from testbed.core.events import EditEvent, Question, Split

CONTROL_SHARE = 0.15
"""Share of records that no event touches: half are asked as controls, half go to the train pool."""
Role = Literal["edit", "probe", "train"]
QuestionKey = tuple[str, str]


@dataclass(frozen=True, slots=True)
class EntryQuestion:
    """A question that a record brings with it. A `portability` answer holds for the record's own target only."""

    split: Split
    prompt: str
    answer: str | None
    image: Shown | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FactEntry:
    """One usable record: `previous` is what was right before any edit (None where the source does not say), with
    `aliases` beside it; `held_out` paraphrases are asked, `train` paraphrases are for editors."""

    name: str
    prompt: str
    target: str
    previous: str | None = None
    subject: str | None = None
    category: str = "other"
    image: Shown | None = None
    aliases: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    asks: tuple[EntryQuestion, ...] = ()
    role: Role = "edit"

    @property
    def place(self) -> QuestionKey:
        return question_key(self.image, self.prompt)


@dataclass(frozen=True)
class Data:
    """What a loader returns. `digest` is a hash of the content, `missing` counts absent pictures by field."""

    origin: str
    entries: tuple[FactEntry, ...]
    skipped: tuple[Skipped, ...]
    digest: str
    missing: Mapping[str, int] = field(default_factory=dict)


def sample(data: Data, number: int) -> Data:
    """The `number` entries with the smallest hashes of their names, in the order of the files; all of them for 0."""
    if not 0 < number < len(data.entries):
        return data
    taken = set(sorted((e.name for e in data.entries), key=lambda name: share("records", name))[:number])
    entries = tuple(e for e in data.entries if e.name in taken)
    return replace(data, entries=entries, origin=f"{data.origin}, {number:,} of them drawn")


def question_key(image: Shown | None, prompt: str) -> QuestionKey:
    """What is asked: the picture, by its name under the root, and the bare prompt."""
    return (image.name if image is not None else ""), plain(prompt)


def with_roles(entries: Iterable[FactEntry]) -> tuple[FactEntry, ...]:
    """Set aside the records that are never edited, by a hash of their names: the same ones under every seed.

    Of a picture with several records one is set aside and asked (same picture, other question), and the
    others are edited.
    """
    entries = tuple(entries)
    by_picture: dict[str, list[FactEntry]] = {}
    for e in entries:
        if e.image is not None:
            by_picture.setdefault(e.image.name, []).append(e)
    roles = {e.name: _role(e.name) for e in entries}
    for group in by_picture.values():
        if len(group) > 1:
            chosen = min(group, key=lambda e: share("sibling", e.name))
            roles |= {e.name: "probe" if e is chosen else "edit" for e in group}
    return tuple(replace(e, role=roles[e.name]) for e in entries)


def _role(name: str) -> Role:
    u = share("control", name)
    return "edit" if u >= CONTROL_SHARE else ("probe" if u < CONTROL_SHARE / 2 else "train")


class QuestionCollector:
    """Collects the questions of one event, each once; places that are edited or trained on are not asked."""

    def __init__(self, event: EditEvent, value: str | None, topic: str, reserved: set[QuestionKey]) -> None:
        self.event, self.topic, self.reserved = event, topic, reserved
        self.asked: list[Question] = []
        self._ids: set[str] = set()
        self._value = plain(value) if value else None
        self._values = {plain(v) for v in (value, event.previous) if v}

    def tells_apart(self, answer: str) -> bool:
        """Whether an answer differs from the edit's new and old value, so that a leak would show."""
        return bool(answer) and plain(answer) not in self._values

    def differs(self, answer: str) -> bool:
        """Whether an answer differs from the value that must not leak."""
        return plain(answer) != self._value

    def add_free(self, ask: EntryQuestion) -> None:
        """Add, unless the very question is an edit's or of the train pool."""
        if question_key(ask.image, ask.prompt) not in self.reserved:
            self.add(ask)

    def add(self, ask: EntryQuestion) -> None:
        q = Question(ask.split, ask.prompt, ask.answer, self.event.id, ask.image, ask.aliases, self.topic)
        if q.id not in self._ids:
            self._ids.add(q.id)
            self.asked.append(q)


def consistent(beliefs: Iterable[Question]) -> Iterator[Question]:
    """The beliefs in order, each place once; where one question of one picture has two answers, neither is given.

    Reads every picture file.
    """
    beliefs = list(beliefs)
    places = [((q.image.key if q.image is not None else ""), plain(q.prompt)) for q in beliefs]
    answers: dict[QuestionKey, set[str]] = {}
    for q, place in zip(beliefs, places):
        answers.setdefault(place, set()).add(plain(q.answer or ""))
    given: set[QuestionKey] = set()
    for q, place in zip(beliefs, places):
        if len(answers[place]) == 1 and place not in given:
            given.add(place)
            yield q
