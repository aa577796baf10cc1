"""Results that all runs of one model have in common, computed once and kept in a folder (`--cache`).

The first process that needs a result computes it, the others wait. The name of a result is a hash of everything that
its values depend on, so a run gets exactly the values that it would have computed itself.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from testbed.core.events import Question, content_id
from testbed.core.schema import BaseAnswer
from testbed.model.handle import ModelHandle
from testbed.storage.files import locked
from testbed.storage.run_folder import RunFolder

_CODE = ("lifelong-editing-testbed", "torch", "transformers")
"""Packages whose version can change an answer."""


def exclusive(path: Path) -> AbstractContextManager[None]:
    """Let one process at a time make the content of a path; the others wait. Raises `StoreError`."""
    return locked(path.with_name(f".{path.name}.lock"), "--cache")


def base_answers(
    folder: Path | None, handle: ModelHandle, questions: Sequence[Question], max_new_tokens: int, ask: Callable[[], list[BaseAnswer]]
) -> list[BaseAnswer]:
    """The answers of the unedited model to these questions in this order, from the folder where it has them.

    Args:
        folder: the cache; None for no cache.
        ask: computes the answers; called where the folder has none.

    The key is the model, dtype, kind of device, prompt form and the whole list of questions, not each question, because the
    questions that share a batch change the last bits of a log-probability. Raises `StoreError` for a folder that cannot
    be written, and whatever `ask` raises.
    """
    if folder is None:
        return ask()
    versions = [package_version(p) for p in _CODE]
    form = (handle.family.text, handle.family.answer, dict(handle.examples))
    key = (handle.hash, str(handle.dtype), handle.device.type, max_new_tokens, [q.id for q in questions], versions, form)
    store = RunFolder(folder / f"unedited-{content_id(*key)}")
    with exclusive(store.path):
        stored = store.base_answers()
        if set(stored) != {q.id for q in questions}:
            store.write_base_answers(ask())
            stored = store.base_answers()
    return [stored[q.id] for q in questions]


def package_version(package: str) -> str:
    """The version of an installed package; "" where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
