"""Measure edits with the version of the project in the current folder; `testbed.bench.compare` runs it by its path.

The argument is a JSON object of options; the last line printed is one of CPU seconds by editor. Names that moved are looked up
by file, because an import of a missing submodule may be answered by another, installed version of the project.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def first_of(*modules: str) -> Any:
    """The first of the modules that has a file in the current folder."""
    return importlib.import_module(next(m for m in modules if Path(*m.split(".")).with_suffix(".py").is_file()))


def given(settings: list[str], editor: str) -> dict[str, Any]:
    """The fields of one editor among settings of the form editor.field=value; a value is a Python literal, else text."""
    out: dict[str, Any] = {}
    for name, _, value in (s.partition("=") for s in settings if s.startswith(f"{editor}.")):
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(value)
        out[name.removeprefix(f"{editor}.")] = value
    return out


FIRST = 5
"""Batches before the clock starts: the first checks layouts and computes second moments, and early edits whether they teach."""


def measure(options: dict[str, Any]) -> dict[str, float]:
    """CPU seconds of all edits but those of the first batches, by editor."""
    import torch

    if options["threads"]:
        torch.set_num_threads(options["threads"])
    registry, events = first_of("testbed.core.registry", "testbed.registry"), first_of("testbed.core.events", "testbed.events")
    models = first_of("testbed.bench.models", "testbed._bench_models")
    handle = models.open_model(options["model"], options["device"], options["dtype"])
    name = options["stream" if handle.reads_pictures else "text_stream"]
    stream = registry.STREAMS.get(name)(first_of("streams.base").StreamConfig(seed=options["seed"]))
    size = options["batch"] or 1
    edits = stream.events(options["edits"] + FIRST * size)
    out = {}
    for editor_name in options["editors"]:
        handle.cache.clear()
        cls = registry.EDITORS.get(editor_name)
        editor = cls(cls.Config(**given(options["set"], editor_name)))
        editor.prepare(handle, stream.train_pool())
        start = 0.0
        for step, at in enumerate(range(0, len(edits), size), 1):
            part = tuple(edits[at : at + size])
            editor.apply(events.EditBatch(part, step, {e.id: stream.paraphrases(e) for e in part}))
            start = time.process_time() if step == FIRST else start
        out[editor_name] = time.process_time() - start
    return out


if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # by default the folder of this file
    print(json.dumps(measure(json.loads(sys.argv[1]))))
