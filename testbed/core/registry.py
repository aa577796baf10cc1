# pyright: strict
"""One registry class for editors, streams, probes, monitors and metrics: a decorator, a package scan, near matches for a wrong name.

A file in the scanned package is a plug-in. A file that cannot be imported raises at the first look-up with its path, so
a broken plug-in never silently disappears from a list. An entry whose name ends in a colon takes the rest of a name as
its argument: `jsonl:FILE` is the class registered as `jsonl:` with `argument` set to FILE.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


class UnknownName(KeyError):
    """A name is not registered; the message gives near matches and the full list."""

    def __str__(self) -> str:
        return str(self.args[0])


class Registry:
    """Names to classes of one kind.

    Args:
        kind: what the entries are, for messages ("editor").
        package: dotted name of the folder whose modules are scanned ("testbed.editors").
        needs: attributes that every entry must have; checked when it registers.
        wrappers: registry of the wrappers that may follow a name after a plus ("alphaedit+blue"); each entry has
            `over(host, name)`, which returns the class of the wrapped host.
    """

    def __init__(self, kind: str, package: str, needs: tuple[str, ...] = (), wrappers: Registry | None = None) -> None:
        self.kind, self.package, self.needs, self.wrappers = kind, package, needs, wrappers
        self._entries: dict[str, type] = {}
        self._wrapped: dict[str, type] = {}
        self._refused: dict[str, str] = {}
        self._scanned = False

    def register(self, name: str) -> Callable[[C], C]:
        """Class decorator. Raises ValueError for a name that another class has or that is refused, or for a lacking attribute."""

        def add(cls: C) -> C:
            missing = [a for a in self.needs if not getattr(cls, a, None)]
            if missing:
                raise ValueError(f"{self.kind} {name!r} ({cls.__module__}.{cls.__qualname__}) lacks {', '.join(missing)}")
            if name in self._refused:
                raise ValueError(f"{self.kind} {name!r} cannot be registered: {self._refused[name]}")
            old = self._entries.get(name)
            if old is not None and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"{self.kind} {name!r} is registered by {old.__module__} and again by {cls.__module__}: rename one")
            cls.name = name  # pyright: ignore[reportAttributeAccessIssue]
            self._entries[name] = cls
            return cls

        return add

    def refuse(self, name: str, reason: str) -> None:
        """Answer this name with the reason why it is not offered, instead of near matches, and let no class take it."""
        self._refused[name] = reason

    def scan(self) -> None:
        """Import every module of the package and its subpackages once, except modules whose name begins with an underscore.

        Raises ImportError that names the broken file.
        """
        if self._scanned:
            return
        for found in pkgutil.walk_packages(importlib.import_module(self.package).__path__, f"{self.package}."):
            if not found.name.rpartition(".")[2].startswith("_"):
                try:
                    importlib.import_module(found.name)
                except Exception as e:
                    raise ImportError(f"the {self.kind} file {found.name} cannot be loaded: {type(e).__name__}: {e}") from e
        self._scanned = True

    def names(self) -> list[str]:
        """All registered names in alphabetical order."""
        return [name for name, _ in self.items()]

    def items(self) -> list[tuple[str, Any]]:
        """Names and classes in alphabetical order of the names."""
        self.scan()
        return sorted(self._entries.items())

    def get(self, name: str) -> Any:
        """The class registered as `name`, or composed from "host+wrapper". Raises `UnknownName` with near matches and the list."""
        self.scan()
        if self.wrappers is not None and "+" in name:
            return self._wrap(name, self.wrappers)
        head, colon, argument = name.partition(":")
        if argument and head + colon in self._entries:
            base = self._entries[head + colon]
            return type(base.__name__, (base,), {"name": name, "argument": argument, "__doc__": base.__doc__})
        if name in self._refused:
            raise UnknownName(f"the {self.kind} {name!r} is not offered: {self._refused[name]}")
        if name not in self._entries:
            near = difflib.get_close_matches(name, self._entries, n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UnknownName(f"no {self.kind} is called {name!r}.{hint} There are: {', '.join(self.names())}.")
        return self._entries[name]

    def _wrap(self, name: str, wrappers: Registry) -> Any:
        """The class of "host+wrapper", composed once. Raises `UnknownName` where the wrapper cannot take the host."""
        if name not in self._wrapped:
            host, _, wrapper = name.rpartition("+")
            try:
                self._wrapped[name] = wrappers.get(wrapper).over(self.get(host), name)
            except TypeError as e:
                raise UnknownName(f"{name!r} cannot be made: {e}") from e
        return self._wrapped[name]


WRAPPERS = Registry("wrapper", "testbed.editors", needs=("summary", "Config", "over"))
EDITORS = Registry("editor", "testbed.editors", needs=("summary", "traits", "Config"), wrappers=WRAPPERS)
PROBES = Registry("probe", "testbed.probes", needs=("summary", "version"))
MONITORS = Registry("monitor", "testbed.monitors", needs=("summary",))
STREAMS = Registry("stream", "streams", needs=("summary", "time_axis", "licence", "size"))
METRICS = Registry("metric", "analysis.metrics", needs=("summary", "short", "unit"))
