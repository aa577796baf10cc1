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
    "scr": {"encoder": "bm25"},
}
"""Settings with which an editor that puts facts into the prompt learns on the committed model, which can rewrite answers too."""


def make(name: str, handle: ModelHandle, stream: Any, seed: int = 0, **settings: Any) -> Editor:
    cls = EDITORS.get(name)
    needed = NEEDS[name]() if name in NEEDS else {}
    editor = cls(cls.Config(**{**needed, **settings}), seed=seed)
    editor.prepare(handle, stream.train_pool())
    return editor


def learners(how: str) -> list[str]:
    """Editors by the way in which they learn (`Traits.learns`)."""
    return [name for name in NAMES if EDITORS.get(name).traits.learns == how]


def two_subjects(stream: Any) -> tuple[EditEvent, EditEvent]:
    """The first new facts of two subjects."""
    first, *others = [e for e in stream.events(12) if e.kind == "add"]
    return first, next(e for e in others if e.subject != first.subject)


def target_logprob(editor: Editor, event: EditEvent) -> float:
    """Mean log-probability of the target's tokens (nats) where the edit's own question is asked."""
    return float(editor.predictor().score([event.ask()], [event.target])[0].logprobs.mean())


def check_learns(editor: Editor, stream: Any, event: EditEvent) -> float:
    """An edit makes its target likelier, by a tenth of a nat a token at least; the gain."""
    before = target_logprob(editor, event)
    report = editor.apply(batch(stream, [event]))
    gain = target_logprob(editor, event) - before
    assert not report.failed, report.failed
    assert gain >= 0.1, f"the target's mean log-probability was {before:.2f} and changed by {gain:.2f}"
    return gain


def check_keeps(editor: Editor, stream: Any, first: EditEvent, second: EditEvent) -> None:
    """An edit makes its target likelier, and keeps half of the gain at least when another subject is edited."""
    before = target_logprob(editor, first)
    gain = check_learns(editor, stream, first)
    report = editor.apply(batch(stream, [second], 2))
    kept = target_logprob(editor, first) - before
    assert not report.failed, report.failed
    assert kept >= gain / 2, f"of a gain of {gain:.2f}, {kept:.2f} are left after the second edit"


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


def same_up_to_rounding(a: list[Response], b: list[Response]) -> bool:
    """Same text and hits, and scores that differ by rounding: an editor that treats rows differently is not asked in packed rows."""
    return all(
        x.generated == y.generated
        and x.score is not None
        and y.score is not None
        and np.allclose(x.score.logprobs, y.score.logprobs, rtol=0, atol=1e-4)
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
