"""What a usable record of any source is, which records are never edited, and how the questions about an edit are collected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Literal, TypeVar

from streams.base import Skipped
from streams.files.pictures import AnyPicture
from streams.files.records import normalize
from streams.transforms import EditableFact, hash_fraction
from testbed.core.events import Ask, EditEvent, Question, Scoring, Split

T = TypeVar("T")
CONTROL_SHARE = 0.15
"""Share of records that no event touches: half are asked as controls, half go to the train pool."""
Role = Literal["edit", "probe", "train"]
QuestionKey = tuple[str, str]
"""What a question asks: the name of its picture under the root ("" without one), and its prompt after `normalize`."""


def question_key(image: AnyPicture | None, prompt: str) -> QuestionKey:
    """The key of a question, by which repeated questions are found."""
    return (image.name if image is not None else ""), normalize(prompt)


def content_key(item: EditEvent | Question | Ask) -> QuestionKey:
    """As `question_key`, with the content of the picture in place of its name."""
    return (item.image.key if item.image is not None else ""), normalize(item.prompt)


@dataclass(frozen=True, slots=True)
class EntryQuestion:
    """A question that a record brings with it.

    Without an `answer`, a locality question is compared with the unedited model's own answer, and any other question
    has the edited fact's value as its answer.
    """

    split: Split
    prompt: str
    answer: str | None = None
    image: AnyPicture | None = None
    aliases: tuple[str, ...] = ()
    of_value: str | None = None
    """The value of the fact under which a given `portability` answer holds; None is the record's own target."""
    needs: tuple[str, ...] = ()
    """Names (`source`) of other entries that must have their targets too, for a question that follows from several edits."""
    choices: tuple[str, ...] = ()
    """The choices of a scoring that picks one; such a question holds for the record's own target alone."""
    scoring: Scoring = "generate"

    @property
    def is_locality(self) -> bool:
        return self.split.startswith("locality_")


@dataclass(frozen=True, slots=True)
class FactEntry(EditableFact):
    """One usable record: a fact with what probes may ask about it and what editors may train on.

    `previous` is the right answer before any edit (None where the source does not say). Probes ask the `held_out`
    paraphrases; editors may train on the `train` ones.
    """

    image: AnyPicture | None = None
    relation: str = "other"
    held_out: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    questions: tuple[EntryQuestion, ...] = ()
    role: Role = "edit"

    @property
    def key(self) -> QuestionKey:
        return question_key(self.image, self.prompt)

    def as_control(self, split: Split) -> EntryQuestion:
        """The record's own question with its answer before any edit."""
        return EntryQuestion(split, self.prompt, self.previous, self.image, self.aliases)

    def as_belief(self, prompt: str, topic: str) -> Question:
        """What a model should answer to the prompt before any edit."""
        return Question("general", prompt, self.previous, image=self.image, aliases=self.aliases, topic=topic)


@dataclass(frozen=True, slots=True)
class DatedChange:
    """One change of a fact: `target` takes the place of `previous` (None: not known) at `time` in years.

    `aliases` are other values of the fact that held at that time.
    """

    previous: str | None
    target: str
    time: float
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class EntryData:
    """What a loader returns.

    `digest` is a hash of the content, `missing` counts absent pictures by field, and `notes` what was passed over within
    records. `changes` has the dated changes of each entry, by its name, where the source has dates.
    """

    origin: str
    entries: tuple[FactEntry, ...]
    skipped: tuple[Skipped, ...]
    digest: str
    missing: Mapping[str, int] = field(default_factory=dict)
    notes: Mapping[str, int] = field(default_factory=dict)
    changes: Mapping[str, Sequence[DatedChange]] = field(default_factory=dict)


def sample(data: EntryData, number: int) -> EntryData:
    """The `number` entries with the smallest hashes of their names, in the order of the files; all of them for 0."""
    if not 0 < number < len(data.entries):
        return data
    taken = set(sorted((e.source for e in data.entries), key=lambda name: hash_fraction("records", name))[:number])
    entries = tuple(e for e in data.entries if e.source in taken)
    return replace(data, entries=entries, origin=f"{data.origin}, {number:,} of them drawn")


def for_development(data: EntryData) -> EntryData:
    """The entries of the train pool as those to edit, and as many of those that are edited otherwise as the train pool."""
    swapped: dict[Role, Role] = {"edit": "train", "train": "edit", "probe": "probe"}
    spare = sum(e.role == "train" for e in data.entries)
    pool = set(sorted((e.source for e in data.entries if e.role == "edit"), key=lambda name: hash_fraction("pool", name))[:spare])
    kept = (e for e in data.entries if e.role != "edit" or e.source in pool)
    return replace(data, entries=tuple(replace(e, role=swapped[e.role]) for e in kept), origin=f"{data.origin}, development part")


def with_true_targets(data: EntryData) -> EntryData:
    """The entries with their answer before any edit as the target, for a model that gets it wrong.

    Left out are entries without such an answer, and questions whose answer holds for the counterfactual target alone.
    """

    def true(e: FactEntry) -> FactEntry:
        kept = tuple(q for q in e.questions if q.is_locality or q.answer is None)
        return replace(e, target=e.previous or "", previous=None if e.role == "edit" else e.previous, questions=kept)

    usable = tuple(e for e in data.entries if e.previous)
    lost = tuple(Skipped(e.source, "no true answer to install") for e in data.entries if not e.previous)
    return replace(data, entries=tuple(map(true, usable)), skipped=(*data.skipped, *lost), origin=f"{data.origin}, true targets")


def rotated(items: Sequence[T], *parts: object) -> Sequence[T]:
    """The items from a position on that a hash of `parts` picks, the items before that position behind them."""
    start = int(hash_fraction(*parts) * len(items))
    return [*items[start:], *items[:start]]


def drawn_role(purpose: str, key: object) -> Role:
    """The role of a record by a hash of its key, the same under every seed."""
    u = hash_fraction(purpose, key)
    return "edit" if u >= CONTROL_SHARE else ("probe" if u < CONTROL_SHARE / 2 else "train")


def with_roles(
    entries: Iterable[FactEntry], purpose: str = "control", key: Callable[[FactEntry], object] = attrgetter("source")
) -> tuple[FactEntry, ...]:
    """Set aside the records that are never edited, by a hash of their keys: the same ones under every seed.

    Of several records about one picture, one becomes a probe (locality: same picture, another question) and the
    others are edited.
    """
    entries = tuple(entries)
    by_picture: dict[str, list[FactEntry]] = {}
    for e in entries:
        if e.image is not None:
            by_picture.setdefault(e.image.name, []).append(e)
    roles = {e.source: drawn_role(purpose, key(e)) for e in entries}
    for group in by_picture.values():
        if len(group) > 1:
            chosen = min(group, key=lambda e: hash_fraction("sibling", key(e)))
            roles |= {e.source: "probe" if e is chosen else "edit" for e in group}
    return tuple(replace(e, role=roles[e.source]) for e in entries)


class QuestionCollector:
    """Collects the questions about one event, each once.

    Args:
        event: the edit that the questions belong to.
        value: what is right after the edit.
        topic: topic of all its questions.
        reserved: what is edited or trained on, and must not be asked.
    """

    def __init__(self, event: EditEvent, value: str | None, topic: str, reserved: set[QuestionKey]) -> None:
        self.event, self.topic, self.reserved = event, topic, reserved
        self._questions: dict[str, Question] = {}
        self._value = normalize(value) if value else None
        self._values = {normalize(v) for v in (value, event.previous) if v}

    @property
    def questions(self) -> tuple[Question, ...]:
        return tuple(self._questions.values())

    def reveals_leak(self, answer: str | None) -> bool:
        """Whether an answer differs from the edit's new and old value, so that a leak would show."""
        return bool(answer) and normalize(answer or "") not in self._values

    def differs_from_value(self, answer: str) -> bool:
        """Whether an answer differs from the edit's new value."""
        return normalize(answer) != self._value

    def add_unreserved(self, question: EntryQuestion, needs: tuple[str, ...] = ()) -> None:
        """Add the question unless an edit or the train pool has the very same."""
        if question_key(question.image, question.prompt) not in self.reserved:
            self.add(question, needs)

    def add_choice(self, split: Split, question: EntryQuestion, answer: str, other: str) -> None:
        """Ask whether `answer` is likelier than `other`, unless they are the same or another edit or the train pool asks it."""
        taken = question.prompt != self.event.prompt and question_key(question.image, question.prompt) in self.reserved
        if normalize(answer) != normalize(other) and not taken:
            choices = (answer, other)
            made = Question(split, question.prompt, answer, self.event.id, question.image, (), self.topic, choices, "mean")
            self._questions.setdefault(made.id, made)

    def add(self, question: EntryQuestion, needs: tuple[str, ...] = ()) -> None:
        """Add the question; `needs` are the ids of other events that must be live when it is asked."""
        q = question
        made = Question(q.split, q.prompt, q.answer, self.event.id, q.image, q.aliases, self.topic, q.choices, q.scoring, needs)
        self._questions.setdefault(made.id, made)


def consistent(beliefs: Iterable[Question]) -> Iterator[Question]:
    """The beliefs in order, each question once; a question of one picture with two different answers is left out.

    Reads every picture file, because copies of a file are one picture.
    """
    beliefs = list(beliefs)
    keys = list(map(content_key, beliefs))
    answers: dict[QuestionKey, set[str]] = {}
    for q, key in zip(beliefs, keys):
        answers.setdefault(key, set()).add(normalize(q.answer or ""))
    first = dict(zip(reversed(keys), reversed(beliefs)))
    yield from (q for q, key in zip(beliefs, keys) if len(answers[key]) == 1 and first[key] is q)
