"""Wrappers: a method that changes part of another, named behind it with a plus (`alphaedit+blue`).

A wrapper is a class that overrides steps of its host and calls `super()` for the rest; `alphaedit+blue` is the
class with both as bases. Its configuration has the fields of both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from testbed.editors.base import Editor


class Wrapper:
    """What a wrapper declares beside the steps it overrides. Registered with `WRAPPERS.register(name)`."""

    summary: ClassVar[str]
    Config: ClassVar[Any]
    hosts: ClassVar[type[Editor]] = Editor
    """What it can wrap."""

    @classmethod
    def over(cls, host: type[Editor], name: str) -> type[Editor]:
        """The class of the host inside this wrapper. Raises TypeError for a host of another kind."""
        if not issubclass(host, cls.hosts):
            raise TypeError(f"it wraps editors of the kind {cls.hosts.__name__}, and {host.name} is none")
        config = dataclass(frozen=True)(type(f"{cls.Config.__name__}Over{host.Config.__name__}", (cls.Config, host.Config), {}))
        body = {"name": name, "summary": f"{host.summary}; {cls.summary}", "Config": config, "__doc__": cls.__doc__}
        return type(cls.__name__ + host.__name__, (cls, host), body)
