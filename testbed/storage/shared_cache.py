"""What many runs of one model compute alike, computed once and kept in a folder (`--cache`).

The first process that needs something makes it, others wait for it. Names are hashes of everything that the values
depend on, so nothing can be taken for what it is not; what is kept is what the run would have computed itself.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from testbed.core.events import Question, content_id
from testbed.core.schema import BaseAnswer
from testbed.model.handle import ModelHandle
from testbed.storage.files import StoreError
from testbed.storage.run_folder import RunFolder

_CODE = ("lifelong-editing-testbed", "torch", "transformers")
"""Packages whose version may move an answer."""


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time makes what lies at a path; the death of that process lets the next one in. Raises `StoreError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        lock.acquire()
    except OSError as e:
        raise StoreError(f"{path.parent} cannot be written: {e}; choose another --cache") from e
    try:
        yield
    finally:
        lock.release()


def base_answers(
    folder: Path | None, handle: ModelHandle, questions: Sequence[Question], longest: int, ask: Callable[[], list[BaseAnswer]]
) -> list[BaseAnswer]:
    """The unedited model's answers to these questions in this order, from the folder where they are there.

    Args:
        longest: new tokens of a generation.
        ask: makes the answers; called where the folder has none, or there is no folder.

    They are kept by model, dtype, kind of device and the whole list of questions, not question by question: which
    questions share a batch moves the last bits of a log-probability. Raises `StoreError` for a folder that cannot be
    written, and what `ask` raises.
    """
    if folder is None:
        return ask()
    what = (handle.hash, str(handle.dtype), handle.device.type, longest, [q.id for q in questions], [_version(p) for p in _CODE])
    store = RunFolder(folder / f"unedited-{content_id(*what)}")
    with alone(store.path):
        found = store.base_answers()
        if set(found) != {q.id for q in questions}:
            store.write_base_answers(ask())
            found = store.base_answers()
    return [found[q.id] for q in questions]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
