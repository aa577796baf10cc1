"""The simulated world as a stream: the same dated changes as text facts, picture questions or captions.

`WorldStream` is the base of every simulated stream; a subclass picks a `QuestionForm`. The truth of every question
at every date is known, so staleness and locality are exact. The words, the facts and the history are in
`streams.world.words`, `facts` and `history`; `cards/world-yearly.md` describes the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from streams import transforms
from streams.base import BadStream, Stream, StreamConfig, TrainPool
from streams.world.facts import configured_world
from streams.world.general import general_questions, pool_questions, pool_texts
from streams.world.history import History, WorldChange
from streams.world.questions import QuestionForm, QuestionMaker
from streams.world.train_edits import train_edits
from testbed.core.events import EditEvent, Question
from testbed.core.registry import STREAMS

FORMS: dict[str, QuestionForm] = {
    "okedit": QuestionForm("okedit", pictures=True, new_photos=2),
    "vqa": QuestionForm("vqa", pictures=True),
    "caption": QuestionForm("caption", pictures=True, captions=True, slots=(0,)),
    "text": QuestionForm("text", pictures=False, new_photos=0),
}
"""The forms that the world's changes come in."""


class WorldStream(Stream):
    """Edits of the simulated world in one form.

    Args:
        config: `world_seed`, `world_size` and `seed` pick the world and its history.
        form: a name in `FORMS`; by default the class's own. Raises `BadStream` for another, and for a
            world that cannot be made.
    """

    time_axis = "simulated"
    licence = "made by this project (MIT)"
    size = "without end; 2,400 facts of 600 entities"
    form: ClassVar[str] = "okedit"

    def __init__(self, config: StreamConfig, form: str | None = None) -> None:
        super().__init__(config)
        name = form or self.form
        if name not in FORMS:
            raise BadStream(f"no form of the simulated world is called {name!r}; there are {', '.join(FORMS)}")
        self.world = configured_world(config)
        self.maker = QuestionMaker(self.world, FORMS[name])
        self._history = History(self.world, config, FORMS[name].slots)
        self._changes: dict[str, WorldChange] = {}
        self._events: list[EditEvent] = []
        self._times = transforms.calendar(config.edits_per_year, config.bursts, transforms.generator(config.seed, "world years"))

    @property
    def origin(self) -> str:
        return f"simulated world {self.world.seed} ({self.world.size:,} entities), {self.maker.form.name} form"

    def events(self, n: int) -> list[EditEvent]:
        """The first n changes; the world never ends. Years start at 1."""
        for change in self._history.first(n)[len(self._events) :]:
            event = self._event(change)
            self._events.append(event)
            self._changes[event.id] = change
        return self._events[:n]

    def _event(self, change: WorldChange) -> EditEvent:
        cause = "" if change.cascade_of is None else f", follows from {self._events[change.cascade_of].id}"
        prompt, image = self.maker.edit_prompt(change.fact)
        return EditEvent(
            kind=change.kind,
            time=next(self._times),
            seq=change.number,
            prompt=prompt,
            target="" if change.kind == "retire" else self.maker.answer(change.fact, change.value),
            image=image,
            previous=self.maker.answer(change.fact, change.previous),
            subject=change.fact.entity.name,
            relation=change.fact.relation.name,
            revises=None if change.revises is None else self._events[change.revises].id,
            source=f"world {self.world.seed}{cause}",
        )

    def _change(self, event: EditEvent) -> WorldChange:
        if event.id not in self._changes:
            self.events(event.seq + 1)
        if event.id not in self._changes:
            raise BadStream(f"event {event.id} ({event.source}) is not of this stream ({self.origin}, seed {self.config.seed})")
        return self._changes[event.id]

    def questions(self, event: EditEvent) -> tuple[Question, ...]:
        """All held-out questions about one edit. Raises `BadStream` for an event of another stream."""
        return self.maker.questions(self._change(event), event.id)

    def general(self) -> tuple[Question, ...]:
        return general_questions(self.world, self.maker.form.pictures)

    def paraphrases(self, event: EditEvent) -> tuple[str, ...]:
        """Train paraphrases of the edit's prompt (16 for a question, 4 for a caption)."""
        return self.maker.train_prompts(self._change(event).fact)

    def train_pool(self) -> TrainPool:
        questions = pool_questions(self.world, self.maker.form.pictures)
        return TrainPool(questions, pool_texts(self.world), lambda: tuple(train_edits(self.maker)))

    def beliefs(self) -> Iterator[Question]:
        """Every fact that the form may ask for, with its value at the start, in the prompt of an edit."""
        for fact in self.world.facts():
            if fact.slot in self.maker.form.slots:
                prompt, image = self.maker.edit_prompt(fact)
                yield Question("general", prompt, self.maker.answer(fact, fact.value), image=image, topic="belief")

    def data_hash(self) -> str:
        return self.world.content_hash()


@STREAMS.register("world-yearly")
class WorldYearly(WorldStream):
    """Text facts asked by name; no pictures."""

    summary = "Simulated world, text facts by name: dated changes, revisions, reverts; exact truth. No files needed."
    form = "text"
