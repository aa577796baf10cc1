"""A stream that reads official files where a data root is given, and else the simulated world in the same form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from streams.base import Stream, StreamConfig, TrainPool
from streams.world.stream import WorldStream
from testbed.core.events import EditEvent, Question


class FilesOrWorld(Stream):
    """Delegates to one of two streams; `origin` and `time_axis` say which of the two a run has used."""

    supports = frozenset({"records", "since"})  # the source refuses what it does not support
    form: ClassVar[str]
    """Form of the simulated world (see `streams.world.stream.FORMS`)."""
    files: ClassVar[type[Stream]]
    """The stream over the official files."""

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

    def train_pool(self) -> TrainPool:
        return self._source.train_pool()

    def beliefs(self) -> Iterator[Question]:
        return self._source.beliefs()

    def data_hash(self) -> str:
        return self._source.data_hash()

    def counts(self) -> dict[str, Any]:
        return self._source.counts()
