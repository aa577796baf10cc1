"""Every registered editor, made on tiny random models, with edits of a stream."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from testbed.core.events import Ask, EditBatch, EditEvent
from testbed.core.registry import EDITORS, WRAPPERS
from testbed.editors.base import Editor
from testbed.model.handle import ModelHandle
from testbed.model.predictor import Response
from tests.helpers.models import folder


def _host_of(wrapper: Any) -> str:
    """The first editor that a wrapper takes."""
    return next(name for name, cls in EDITORS.items() if issubclass(cls, wrapper.hosts))


NAMES = [*EDITORS.names(), *(f"{_host_of(wrapper)}+{name}" for name, wrapper in WRAPPERS.items())]


STREAM = {"llava": "okedit-yearly", "gpt2": "world-yearly"}


NEEDS = {"postedit": lambda: {"model": str(folder("llama"))}}
"""Settings that an editor cannot do without."""


def make(name: str, handle: ModelHandle, stream: Any, seed: int = 0) -> Editor:
    cls = EDITORS.get(name)
    editor = cls(cls.Config(**NEEDS[name]()) if name in NEEDS else None, seed=seed)
    editor.prepare(handle, stream.train_pool())
    return editor


def batch(stream: Any, events: list[EditEvent], step: int = 1) -> EditBatch:
    return EditBatch(tuple(events), step, {e.id: stream.paraphrases(e) for e in events})


def asks(stream: Any, events: list[EditEvent], editor: Editor) -> list[Ask]:
    """Each edit as it was made and one neighbour of it; only a told editor is told."""
    own = [Ask(e.prompt, e.image, e.target if editor.traits.told_truth else None) for e in events]
    beside = [q for e in events for q in stream.questions(e) if q.split == "locality_far"]
    return own + [q.ask() for q in beside]


def respond(editor: Editor, what: list[Ask]) -> list[Response]:
    return editor.predictor().respond(what, ["yes"] * len(what), 4)


def same(a: list[Response], b: list[Response]) -> bool:
    """Same text and bit-equal scores."""
    return all(
        x.generated == y.generated
        and x.score is not None
        and y.score is not None
        and np.array_equal(x.score.logprobs, y.score.logprobs)
        and np.array_equal(x.score.hits, y.score.hits)
        for x, y in zip(a, b, strict=True)
    )


def equal_states(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items())


def frozen(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


FEW = {"steps": 2, "encoder": "bm25"}


def quick(name: str, handle: ModelHandle, stream: Any) -> Editor:
    """An editor that takes few optimiser steps, where it takes any, and needs no encoder."""
    cls = EDITORS.get(name)
    config = cls.Config(**NEEDS[name]()) if name in NEEDS else cls.Config()
    own = {f.name for f in fields(config)}
    editor = cls(replace(config, **{k: v for k, v in FEW.items() if k in own}), seed=0)
    editor.prepare(handle, stream.train_pool())
    return editor
