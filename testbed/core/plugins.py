# pyright: strict
"""Plug-ins from outside the package: a file, a module, or the entry points `testbed.plugins` of installed distributions.

A plug-in registers its classes when it is imported, as a file inside the package does. What was loaded is known by the hash
of its file, so that a run is not continued with another version of it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

from testbed.core.registry import EDITORS, METRICS, MONITORS, PROBES, STREAMS, WRAPPERS

GROUP = "testbed.plugins"
"""Group of entry points; each names a module."""
REGISTRIES = (EDITORS, WRAPPERS, STREAMS, PROBES, MONITORS, METRICS)


class BadPlugin(ValueError):
    """A plug-in cannot be used; the message says which, why and what to do."""


def load_plugins(given: Iterable[str]) -> dict[str, str]:
    """Import plug-ins and those of installed distributions; returns the SHA-256 (64 hex digits) of each given one's file.

    given: a path of a Python file, or a module's name. Raises `BadPlugin` for one that cannot be imported, that registers
    nothing, or whose file changed since this process loaded it.
    """
    installed_plugins()
    return {name: _load(name) for name in given}


def installed_plugins() -> dict[str, str]:
    """Import the plug-ins that installed distributions offer; returns the SHA-256 of each one's file by what it is called.

    Raises `BadPlugin` for one that cannot be imported.
    """
    found: dict[str, str] = {}
    for point in _points(tuple(map(_changed, sys.path))):
        what = f"the entry point {point.name} of {point.dist.name if point.dist else 'a distribution'}"
        file = _import(point.value, what).__file__
        found[what] = _hash(Path(file)) if file else ""
    return found


@lru_cache(maxsize=4)
def _points(folders: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """The entry points of the distributions in folders, read again when a folder changes.

    Reading them takes longer than all else that a configuration needs, and a sweep has many.
    """
    return tuple(entry_points(group=GROUP))


def _changed(folder: str) -> tuple[str, int]:
    """A folder of `sys.path`, and when something was put into it or taken out of it."""
    path = Path(folder)
    return str(path.absolute()), path.stat().st_mtime_ns if path.exists() else 0


def refuse_changed(given: Iterable[str], known: Iterable[str], installed: Mapping[str, str]) -> None:
    """Raise `BadPlugin` where a plug-in is not what it was when the run began.

    given, known: files, of which nothing runs before this check, and the SHA-256 of those of the run.
    installed: what `installed_plugins` gave then. A distribution that was installed since does no harm.
    """
    now = installed_plugins() if installed else {}
    for what, digest in installed.items():
        if now.get(what) != digest:
            change = "changed since the run began" if what in now else "is not installed any more"
            raise BadPlugin(f"{what} {change}: install the version that the run began with, or begin a new run")
    for name in given:
        path = Path(name).expanduser()
        if path.is_file() and _hash(path) not in known:
            raise BadPlugin(f"plugin {name} changed since the run began: restore the file (plugins in its manifest), or begin a new run")


def _load(given: str) -> str:
    path = Path(given).expanduser()
    if path.suffix == ".py" or path.is_file():
        if not path.is_file():
            raise BadPlugin(f"plugin {given}: there is no such file in {path.parent.absolute()}")
        return _load_file(path.resolve())
    module = _import(given, f"plugin {given}")
    if module.__file__ is None:
        raise BadPlugin(f"plugin {given} is a package without a file of its own: name the module that registers its classes")
    return _hash(Path(module.__file__))


def _load_file(path: Path) -> str:
    """The file under a name of its own, so that it may be called as a module of anybody else."""
    digest, name = _hash(path), f"testbed_plugin_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    known = sys.modules.get(name)
    if known is not None:
        if vars(known)["PLUGIN_SHA256"] != digest:
            raise BadPlugin(f"plugin {path} changed since this process loaded it: start again")
        return digest
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise BadPlugin(f"plugin {path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    vars(module)["PLUGIN_SHA256"] = digest
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as e:
        del sys.modules[name]
        if isinstance(e, Exception):
            raise BadPlugin(f"plugin {path} cannot be loaded: {type(e).__name__}: {e}") from e
        raise
    if not any(cls.__module__ == name for registry in REGISTRIES for _, cls in registry.items()):
        raise BadPlugin(f'plugin {path} registers nothing: put a decorator such as @EDITORS.register("name") on its classes')
    return digest


def _import(name: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as e:
        hint = "" if name.isidentifier() else "; a file is given by its path, which ends in .py"
        raise BadPlugin(f"{what} cannot be loaded: {type(e).__name__}: {e}{hint}") from e


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
