"""Every registered editor, made on tiny random models, with edits of a stream."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from testbed.checks.editors import EditorCase
from testbed.core.registry import EDITORS, WRAPPERS
from testbed.editors.base import Editor
from testbed.model.handle import ModelHandle
from tests.helpers.models import folder


def _host_of(wrapper: Any) -> str:
    """The first editor that a wrapper takes."""
    return next(name for name, cls in EDITORS.items() if issubclass(cls, wrapper.hosts))


NAMES = [*EDITORS.names(), *(f"{_host_of(wrapper)}+{name}" for name, wrapper in WRAPPERS.items())]


STREAM = {"llava": "okedit-yearly", "gpt2": "world-yearly"}


NEEDS = {"postedit": lambda: {"model": str(folder("llama"))}}
"""Settings that an editor cannot do without."""


LEARNING: dict[str, dict[str, Any]] = {
    # on a random model a paraphrase lies farther from an edit than another subject's question does, so that the rule for
    # revisions would take the second edit for a new value of the first
    "balancedit-plus": {"revision": "key"},
    # a random fifth of a matrix of 64 x 96 is 1,200 numbers, too few for two edits
    "wise": {"density": 1.0},
}
"""Settings with which an editor learns on a tiny random model, where its own are for other models, each with the reason."""
IN_CONTEXT: dict[str, dict[str, Any]] = {
    "ike": {"encoder": "bm25"},
    "postedit": {"encoder": "bm25", "model": "tiny"},
    "serac": {},
    "scr": {"encoder": "bm25"},
}
"""Settings with which an editor that puts facts into the prompt learns on the committed model, which can rewrite answers too."""


BRIEF: dict[str, Any] = {"train_steps": 4, "judge_every": 4, "held_out": 0.01, "normalise_over": 40, "prompts": 3, "trajectory": 2}
"""Settings with which a training on train edits, before the first edit, ends soon, and few prompts of a fact are read."""


STEPS: dict[str, Any] = {"steps": 3}
"""Optimiser steps of an edit where a check does not ask whether it learns: what an edit leaves behind shows after few of them too."""


def of_config(cls: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings that an editor's configuration has."""
    own = {f.name for f in fields(cls.Config)}
    return {k: v for k, v in settings.items() if k in own}


def case_of(name: str, handle: ModelHandle, stream: Any) -> EditorCase:
    """The editor with the settings that it needs on tiny random models; where it has to learn, with its own number of steps."""
    cls = EDITORS.get(name)
    needed = {**of_config(cls, BRIEF), **of_config(cls, STEPS), **(NEEDS[name]() if name in NEEDS else {})}
    own = {f.name: f.default for f in fields(cls.Config) if f.name in STEPS}
    return EditorCase(name, handle, stream, needed, {**own, **LEARNING.get(name, {})})


def make(name: str, handle: ModelHandle, stream: Any, seed: int = 0, **settings: Any) -> Editor:
    return case_of(name, handle, stream).make(seed, **settings)


def learners(how: str) -> list[str]:
    """Editors by the way in which they learn (`Traits.learns`)."""
    return [name for name in NAMES if EDITORS.get(name).traits.learns == how]


FEW = {"steps": 2, "encoder": "bm25", **BRIEF}


def quick(name: str, handle: ModelHandle, stream: Any) -> Editor:
    """An editor that takes few optimiser steps, where it takes any, and needs no encoder."""
    cls = EDITORS.get(name)
    config = cls.Config(**NEEDS[name]()) if name in NEEDS else cls.Config()
    own = {f.name for f in fields(config)}
    editor = cls(replace(config, **{k: v for k, v in FEW.items() if k in own}), seed=0)
    editor.prepare(handle, stream.train_pool())
    return editor
