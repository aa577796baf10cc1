"""A stream of plain facts as tests need it: any years, any revisions, questions of every split, no pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streams.base import Stream, StreamConfig, TrainPool
from testbed.core.events import LOCALITY_SPLITS, EditEvent, Question

TOPICS = ("colours", "numbers", "ships")


@dataclass(frozen=True)
class Line:
    """One edit to be: its time, and which earlier edit it replaces."""

    time: float
    revises: int | None = None
    kind: str = "add"
    target: str = ""


class PlainStream(Stream):
    """Edits as they are listed; two questions of some splits, one of others, none of `stale` for new facts."""

    name = "plain"
    summary = "plain facts for tests"
    time_axis = "simulated"
    licence = "MIT"

    def __init__(self, lines: Sequence[Line]) -> None:
        super().__init__(StreamConfig())
        self.all: list[EditEvent] = []
        for i, line in enumerate(lines):
            self.all.append(self._event(i, line))

    def _event(self, i: int, line: Line) -> EditEvent:
        old = None if line.revises is None else self.all[line.revises]
        prompt = f"What is fact {i}?" if old is None else old.prompt
        target = "" if line.kind == "retire" else line.target or f"value {i}"
        revises = {"previous": old.target, "revises": old.id} if old is not None else {}
        return EditEvent(line.kind, line.time, i, prompt, target, relation="is", source=f"line {i}", **revises)  # type: ignore[arg-type]

    @property
    def origin(self) -> str:
        return f"{len(self.all)} lines"

    def events(self, n: int) -> list[EditEvent]:
        return self.all[:n]

    def questions(self, event: EditEvent) -> tuple[Question, ...]:
        answer = event.target or "unknown"
        out = [Question("edit", event.prompt, answer, event.id)]
        out += [Question("text_generality", f"{event.prompt} Say it ({i}).", answer, event.id) for i in range(2)]
        out += [Question("image_generality", f"{event.prompt} Look.", answer, event.id)]
        out += [Question(split, f"{event.prompt} Beside it: {split}?", None, event.id) for split in LOCALITY_SPLITS]  # type: ignore[arg-type]
        out += [Question("portability", f"{event.prompt} So?", f"so {answer}", event.id)]
        out += [Question("stale", event.prompt, event.previous, event.id)] if event.previous else []
        return tuple(out)

    def general(self) -> tuple[Question, ...]:
        asked = [Question("general", f"{t} {i}?", f"{i}", topic=t) for t in TOPICS for i in range(14)]
        return (*asked, *(Question("text", f"the old bridge number {i}", topic="running") for i in range(30)))

    def paraphrases(self, event: EditEvent) -> tuple[str, ...]:
        return (f"{event.prompt} Train.",)

    def train_pool(self) -> TrainPool:
        texts = tuple(f"text number {i} of the pool, which is about something" for i in range(60))
        return TrainPool((Question("general", "pool?", "pool", topic="pool"),), texts)


def lines(n: int, per_year: int = 10, revise_every: int = 4) -> list[Line]:
    """n edits, `per_year` a year; each `revise_every`-th replaces the newest one that still stands."""
    out: list[Line] = []
    live: list[int] = []
    for i in range(n):
        old = live.pop() if revise_every and i % revise_every == revise_every - 1 else None
        out.append(Line(1 + i / per_year, old, "add" if old is None else "revise"))
        live.append(i)
    return out


def plain(n: int, per_year: int = 10, revise_every: int = 4) -> PlainStream:
    return PlainStream(lines(n, per_year, revise_every))
