"""A stream that reads official files where a data root is given, and else the simulated world in the same form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

from streams.base import Stream, StreamConfig
from streams.world.stream import WorldStream
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
    """Stands for one of two streams, which it makes in its place; `origin` and `time_axis` say which of the two a run has used."""

    form: ClassVar[str]
    files: ClassVar[type[Stream]]

    def __new__(cls, config: StreamConfig) -> Stream:  # pyright: ignore
        """The simulated world without a data root, else the stream over files, under this name with its facts for `--list`."""
        made: Any = WorldStream(config, cls.form) if config.data_root is None else cls.files(config)
        made.name, made.summary, made.licence, made.size = cls.name, cls.summary, cls.licence, cls.size
        return made
