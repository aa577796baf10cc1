"""A stream that reads official files where a data root is given, and else the simulated world in the same form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from streams.base import Stream, StreamConfig, TrainPool
from streams.world.stream import WorldStream
from testbed.core.events import EditEvent, Question
from testbed.core.registry import STREAMS

S = TypeVar("S", bound=type[Stream])


def or_world(name: str, form: str) -> Callable[[S], S]:
    """Class decorator: register a stream over official files, which without a data root is the simulated world in `form`."""

    def add(files: S) -> S:
        about = {key: getattr(files, key) for key in ("summary", "time_axis", "licence", "size", "__doc__", "__module__")}
        STREAMS.register(name)(type(f"{files.__name__}OrWorld", (FilesOrWorld,), about | {"form": form, "files": files}))
        files.name = name
        return files

    return add


class FilesOrWorld(Stream):
    """Delegates to one of two streams; `origin` and `time_axis` say which of the two a run has used."""

    supports = frozenset({"records", "since", "development", "wrong"})  # the source refuses what it does not support
    form: ClassVar[str]
    files: ClassVar[type[Stream]]

    def __init__(self, config: StreamConfig) -> None:
        super().__init__(config)
        self._source = WorldStream(config, self.form) if config.data_root is None else self.files(config)
        self.skipped = self._source.skipped
        self.time_axis = self._source.time_axis

    @property
    def origin(self) -> str:
        return self._source.origin

    def events(self, n: int) -> list[EditEvent]:
        return self._source.events(n)

    def questions(self, event: EditEvent) -> tuple[Question, ...]:
        return self._source.questions(event)

    def general(self) -> tuple[Question, ...]:
        return self._source.general()

    def paraphrases(self, event: EditEvent) -> tuple[str, ...]:
        return self._source.paraphrases(event)

    def examples(self) -> Mapping[str, tuple[tuple[str, str], ...]]:
        return self._source.examples()

    def train_pool(self) -> TrainPool:
        return self._source.train_pool()

    def beliefs(self) -> Iterator[Question]:
        return self._source.beliefs()

    def data_hash(self) -> str:
        return self._source.data_hash()

    def notes(self, events: Sequence[EditEvent]) -> list[str]:
        return self._source.notes(events)

    def counts(self) -> dict[str, Any]:
        return self._source.counts()
