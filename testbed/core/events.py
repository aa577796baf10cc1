# pyright: strict
"""The elements of a stream: edits in time order, and the questions that probes ask about them.

Edits and questions are separate objects: an editor receives an `EditBatch` and nothing else, so a held-out paraphrase
cannot reach it. Ids are hashes of the content (same content, same id, on any machine and in any order of the stream),
so records of different runs and orders can be paired.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, get_args, runtime_checkable

import numpy as np
import numpy.typing as npt

Kind = Literal["add", "revise", "revert", "retire"]
Split = Literal[
    "edit",
    "text_generality",
    "image_generality",
    "locality_hard",
    "locality_sibling",
    "locality_far",
    "locality_text",
    "portability",
    "stale",
    "choice_edit",
    "choice_generality",
    "choice_locality",
    "generality_yes_no",
    "generality_choice",
    "generality_reversed",
    "portability_3hop",
    "portability_4hop",
    "portability_5hop",
    "portability_6hop",
    "robustness",
    "sub_question",
    "instance_follow",
    "instance_stay",
    "self_assessment",
    "persistence",
    "generation",
    "qa_edit",
    "qa_generality",
    "general",
    "text",
]
Scoring = Literal["generate", "sum", "norm", "mean", "text", "refuse", "comply", "sample"]
"""How an answer is judged: `generate` by free generation; `sum`, `norm`, `mean` and `text` by the likeliest choice (summed
log-probability, log-probability per character or per token, log-probability as running text); `refuse` and `comply` by
whether the model refuses. `sample` is not judged: a text is drawn and kept, for metrics of texts."""
KINDS: tuple[str, ...] = get_args(Kind)
SCORINGS: tuple[str, ...] = get_args(Scoring)
SPLITS: tuple[str, ...] = get_args(Split)
LOCALITY_SPLITS: tuple[str, ...] = tuple(s for s in SPLITS if s.startswith("locality_"))


class BadEvent(ValueError):
    """An edit or a question is not valid; the message names the field, the value and the record."""


@runtime_checkable
class Picture(Protocol):
    """A picture that is decoded on demand.

    `key` identifies the pixels: two pictures with one key are the same picture. `load` returns RGB as uint8 of
    shape (height, width, 3) and raises `BadPicture` when the picture cannot be decoded.
    """

    @property
    def key(self) -> str: ...

    def load(self) -> npt.NDArray[np.uint8]: ...


class BadPicture(ValueError):
    """A picture is absent, unreadable or no picture; the message names the file and the remedy."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a text is drawn: each of `tokens` tokens among the `top_k` likeliest, by numbers that follow from `seed` alone.

    Source: the released code of ROME (`generate_fast`), which draws among five. It does not seed its draws, and it ends at 100 tokens
    with the prompt counted; here as many follow the prompt, however many facts an editor puts before it.
    """

    seed: str
    tokens: int = 100
    top_k: int = 5

    def draws(self) -> npt.NDArray[np.float64]:
        """(tokens,) numbers in [0, 1), the same on any machine and in any batch."""
        return np.random.default_rng(int(content_id("sampling", self.seed), 16)).random(self.tokens)


@dataclass(frozen=True, slots=True)
class Ask:
    """A prompt for a model, with its picture, and the relation that it asks for, of which a prompt template may show examples.

    With `sampled` a text is drawn in place of a greedy answer. `truth` (the right answer) and `event_id` (the edit that gave it) are
    set only for an editor whose `Traits` declare `told_truth`.
    """

    prompt: str
    image: Picture | None = None
    truth: str | None = None
    event_id: str | None = None
    relation: str = ""
    sampled: Sampling | None = None


def content_id(*parts: object) -> str:
    """First 16 hex digits of the SHA-256 of the parts, written as canonical JSON."""
    text = json.dumps(parts, ensure_ascii=True, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class EditEvent:
    """One dated change of one fact.

    `time` is in years (the floor is the year, the fraction the time within it); `seq` is the position in the stream.
    Neither is part of the id: the same change in another order of the stream is the same change. `revises` is the id
    of the event whose value this one replaces. A `retire` demands that the model forgets the fact, i.e. answers as it
    did before any edit; its `target` is empty. Raises `BadEvent` for a field that is not valid.
    """

    kind: Kind
    time: float
    seq: int
    prompt: str
    target: str
    image: Picture | None = None
    previous: str | None = None
    subject: str | None = None
    relation: str | None = None
    revises: str | None = None
    source: str = ""
    id: str = ""

    def __post_init__(self) -> None:
        _require_kind(self.kind, KINDS, "kind", self.source)
        _require_text(self.prompt, "prompt", self.source)
        if self.kind != "retire":
            _require_text(self.target, "target", self.source)
        _require_years(self.time, self.source)
        if self.seq < 0:
            raise BadEvent(f"seq must be 0 or more, got {self.seq} ({self.source or 'no source'})")
        if self.kind in ("revise", "revert", "retire") and not self.revises:
            raise BadEvent(f"a {self.kind} must name the event it revises ({self.source or 'no source'})")
        if not self.id:
            fact = (self.previous, self.subject, self.relation, self.revises, self.source)
            object.__setattr__(self, "id", content_id("edit", self.kind, self.prompt, _key(self.image), self.target, *fact))

    @property
    def year(self) -> int:
        return math.floor(self.time)

    def ask(self) -> Ask:
        """The prompt of the edit with its picture."""
        return Ask(self.prompt, self.image, relation=self.relation or "")

    @property
    def fact(self) -> tuple[str, str]:
        """The changed fact: (subject, relation) where the source names them, else (picture key, prompt)."""
        return (self.subject, self.relation) if self.subject and self.relation else (_key(self.image) or "", self.prompt)


@dataclass(frozen=True, slots=True)
class Question:
    """A question for a model, and the answers that count as right.

    `answer` may be absent for locality splits (the answer of the unedited model is the reference), for `text` (running
    text: the perplexity of `prompt` itself is measured) and for the scorings `refuse` and `comply`. `aliases` count as
    right too. The scorings `sum`, `norm`, `mean` and `text` pick one of `choices`, of which `answer` is the right one. A question
    that follows from several edits is asked only while the events in `needs`, by id, are live too. Raises `BadEvent` for a
    field that is not valid.
    """

    split: Split
    prompt: str
    answer: str | None = None
    event_id: str | None = None
    image: Picture | None = None
    aliases: tuple[str, ...] = ()
    topic: str = ""
    choices: tuple[str, ...] = ()
    scoring: Scoring = "generate"
    needs: tuple[str, ...] = ()
    id: str = ""

    def __post_init__(self) -> None:
        _require_kind(self.split, SPLITS, "split", self.topic)
        _require_kind(self.scoring, SCORINGS, "scoring", self.topic)
        _require_text(self.prompt, "prompt", f"question of event {self.event_id}")
        self._check_choices()
        needed = self.scoring not in ("refuse", "comply") and self.split != "text" and self.split not in LOCALITY_SPLITS
        if self.answer is None and needed:
            raise BadEvent(f"a {self.split} question needs an answer: {self.prompt!r}")
        if self.answer is not None:
            _require_text(self.answer, "answer", f"question {self.prompt!r}")
        if not self.id:
            key = self.image.key if self.image is not None else None
            parts = ("question", self.split, self.prompt, self.answer, self.event_id, key, sorted(self.aliases), self.topic)
            more = () if self.scoring == "generate" else (self.scoring, self.choices)
            more += (sorted(self.needs),) if self.needs else ()
            object.__setattr__(self, "id", content_id(*parts, *more))

    def _check_choices(self) -> None:
        if self.scoring in ("sum", "norm", "mean", "text"):
            for c in self.choices:
                _require_text(c, "choice", f"question {self.prompt!r}")
            if len(set(self.choices)) < max(2, len(self.choices)) or self.answer not in self.choices:
                raise BadEvent(f"choices must be two or more different ones and hold the answer {self.answer!r}, got {self.choices!r}")
        elif self.choices:
            raise BadEvent(f"choices need a scoring that picks one (sum, norm, mean, text), got {self.scoring!r} ({self.prompt!r})")

    def ask(self) -> Ask:
        """The prompt of the question with its picture; its topic is the relation. Where its scoring is `sample`, its id is the seed."""
        sampled = Sampling(self.id) if self.scoring == "sample" else None
        return Ask(self.prompt, self.image, relation=self.topic, sampled=sampled)

    @property
    def golds(self) -> tuple[str, ...]:
        """The answer and its aliases; empty where the question has no answer of its own."""
        return (self.answer, *self.aliases) if self.answer is not None else ()


@dataclass(frozen=True, slots=True)
class EditBatch:
    """The input of one `apply` call: the edits of one step, in order, and the training samples that `Traits` declare.

    `paraphrases` maps an event id to rephrased prompts from the train pool; no probe ever asks them. `closes_year`: no later
    edit of the same year follows; a batch outside a stream is a year of its own. Raises `BadEvent` where one edit stands twice.
    """

    events: tuple[EditEvent, ...]
    step: int = 0
    paraphrases: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    closes_year: bool = True

    def __post_init__(self) -> None:
        if twice := sorted(i for i, n in Counter(e.id for e in self.events).items() if n > 1):
            raise BadEvent(f"step {self.step} holds the same edit twice: {', '.join(twice)}")

    def __len__(self) -> int:
        return len(self.events)


def hide_previous(event: EditEvent) -> EditEvent:
    """The event without its old answer (same id), for an editor whose `Traits` do not declare the use of it."""
    return event if event.previous is None else replace(event, previous=None)


def check_order(events: list[EditEvent] | tuple[EditEvent, ...]) -> None:
    """Raise `BadEvent` unless ids are unique, times never fall, `seq` is the position and `revises` names an earlier event."""
    seen: set[str] = set()
    last = -math.inf
    for i, e in enumerate(events):
        if e.id in seen:
            raise BadEvent(f"event {i} ({e.source}) repeats id {e.id}: the same change stands twice in the stream")
        if e.time < last:
            raise BadEvent(f"event {i} ({e.source}) is dated {e.time}, before the one ahead of it ({last}): sort the stream by time")
        if e.seq != i:
            raise BadEvent(f"event {i} ({e.source}) has seq {e.seq}; seq must be its position")
        if e.revises and e.revises not in seen:
            raise BadEvent(f"event {i} ({e.source}) revises {e.revises}, which does not come before it")
        seen.add(e.id)
        last = e.time


def _key(image: Picture | None) -> str | None:
    return image.key if image is not None else None


def _require_kind(value: str, allowed: tuple[str, ...], name: str, where: str) -> None:
    if value not in allowed:
        raise BadEvent(f"{name} must be one of {', '.join(allowed)}, got {value!r} ({where or 'no source'})")


def _require_years(value: object, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise BadEvent(f"time must be a finite number of years, got {value!r} ({where or 'no source'})")


def _require_text(value: object, name: str, where: str) -> None:
    if not isinstance(value, str) or not value.strip():
        raise BadEvent(f"{name} must be text that is not empty, got {value!r} ({where or 'no source'})")
