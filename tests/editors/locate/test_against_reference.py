"""Every method against a plain float64 version of it: the weights after two batches of a stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from testbed.core.events import EditBatch
from testbed.core.registry import EDITORS
from testbed.editors.base import Editor
from testbed.model.handle import ModelHandle
from testbed.model.loading import load
from tests.helpers.facts import FACTS, POOL
from tests.helpers.models import folder
from tests.reference.locate import PlainLocate, Settings

WITHIN = ("olmo2", "gemma3_text")
"""Families with a norm behind the MLP: one layer is written, and its target is a change of the MLP's output."""
BATCHES = (FACTS[:2], FACTS[2:])
SEARCH = {"steps": 5, "lr": 0.5, "clamp": 0.8, "kl": 0.3, "decay": 0.5, "contexts": 2}


@cache
def double(kind: str) -> ModelHandle:
    return load(str(folder(kind)), device="cpu", dtype="float64")


def edited(name: str, kind: str, **config: Any) -> Editor:
    cls = EDITORS.get(name)
    editor = cls(cls.Config(**{**SEARCH, **config}))
    editor.prepare(double(kind), POOL)
    for step, events in enumerate(BATCHES, 1):
        assert not editor.apply(EditBatch(tuple(events), step)).failed
    return editor


def reference(editor: Any, layers: tuple[int, ...]) -> PlainLocate:
    h, within = editor.hyper, editor.handle.model.config.model_type in WITHIN
    own = layers[-1:] if within else layers
    settings = Settings(own, editor.contexts, h.steps, h.lr, h.decay, h.clamp, h.kl, h.stop, editor.bare_share, within)
    return PlainLocate(editor.handle, settings)


def prior(editor: Any, lam: float) -> dict[int, Tensor]:
    """lam (C + eta m I) of each layer, lam in units of the key width where it is relative."""
    out = {}
    for n, c in editor.second_moments.items():
        unit = len(c) if editor.hyper.relative else 1
        out[n] = lam * unit * (c + editor.config.eta * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64))
    return out


def memit(editor: Any) -> PlainLocate:
    plain = reference(editor, (0, 1))
    for events in BATCHES:
        plain.memit(events, prior(editor, editor.hyper.lam), editor.history)
    return plain


def emmet(editor: Any) -> PlainLocate:
    plain = reference(editor, (1,))
    for events in BATCHES:
        plain.memit(events, prior(editor, editor.hyper.lam))
    return plain


def pmet(editor: Any) -> PlainLocate:
    plain = reference(editor, (0, 1))
    for events in BATCHES:
        plain.memit(events, prior(editor, editor.hyper.lam), pmet=True)
    return plain


def alphaedit(editor: Any) -> PlainLocate:
    plain = reference(editor, (0, 1))
    traces = {n: float(c.diagonal().sum()) for n, c in editor.second_moments.items()}
    l2 = {n: editor.hyper.l2 * t for n, t in traces.items()}
    threshold = {n: editor.hyper.threshold * t / len(editor.second_moments[n]) for n, t in traces.items()}
    for events in BATCHES:
        plain.alphaedit(events, editor.second_moments, threshold, l2)
    return plain


def rome(editor: Any) -> PlainLocate:
    plain = reference(editor, (1,))
    c = editor.second_moments[1]
    for e in FACTS:
        plain.rome(e, c + editor.config.eta * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64))
    return plain


CASES: dict[str, tuple[str, dict[str, Any], Callable[[Any], PlainLocate]]] = {
    "memit": ("memit", {"layers": (0, 1)}, memit),
    "memit-seq": ("memit-seq", {"layers": (0, 1)}, memit),
    "alphaedit": ("alphaedit", {"layers": (0, 1), "threshold": 1.0}, alphaedit),
    "emmet": ("emmet", {"layer": 1}, emmet),
    "pmet": ("pmet", {"layers": (0, 1)}, pmet),
    "rome": ("rome", {"layer": 1}, rome),
}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "olmo2", pytest.param("gemma3_text", marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", list(CASES))
def test_the_weights_are_those_of_the_plain_version(case: str, kind: str) -> None:
    name, config, of = CASES[case]
    editor: Any = edited(name, kind, **config)
    plain = of(editor)
    assert set(plain.weights) == set(editor.deltas.current)
    for layer, w in plain.weights.items():
        base = editor.deltas.base(layer)
        change = editor.deltas.weight(layer) - base
        assert float(change.norm()) > 1e-3 * float(base.norm())
        assert float((w - base - change).norm() / change.norm()) < 1e-3, layer
