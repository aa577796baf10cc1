"""Small ELDER editors on random models, and what the tests read off them."""

from __future__ import annotations

from typing import Any

import torch

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch, EditEvent
from testbed.editors.adapters.elder import Elder, ElderConfig
from testbed.editors.adapters.elder_routing import CodeRouter, MixtureGate
from testbed.editors.codebook.keys import last_position
from testbed.model.encoding import collate
from testbed.model.handle import ModelHandle
from tests.helpers.facts import fact
from tests.helpers.models import Noise, build

SMALL: dict[str, Any] = {"steps": 3, "lr": 0.02, "rank": 2, "experts": 6, "modules": r"\.[12]\.mlp\.down_proj$"}
PICTURED = [fact("the northern harbour", "Mara Venn", 1), fact("Zor", "two red towers"), fact("the old bridge", "green", 2)]
BESIDE = [Ask("what colour is the lamp?"), Ask("a red circle, a blue square"), Ask("who?", Noise(7)), Ask("the river and", Noise(8))]


def make(kind: str = "llava", seed: int = 0, **config: Any) -> Elder:
    editor = Elder(ElderConfig(**{**SMALL, **config}), seed)
    editor.prepare(build(kind), TrainPool())
    return editor


def edited(events: list[EditEvent] = PICTURED, kind: str = "llava", **config: Any) -> Elder:
    editor = make(kind, **config)
    report = editor.apply(EditBatch(tuple(events), 1))
    assert not report.failed
    return editor


def asks(events: list[EditEvent]) -> list[Ask]:
    return [e.ask() for e in events]


def gate_of(editor: Elder, eps: int | None) -> MixtureGate:
    return MixtureGate(editor.handle, editor.targets, editor.mixture, CodeRouter(editor.codes, eps))


def logits(handle: ModelHandle, gate: MixtureGate | None, what: list[Ask], side: Any = "left", **answers: Any) -> torch.Tensor:
    batch = collate(handle, what, side=side, **answers)
    with torch.no_grad():
        if gate is None:
            return handle.model(**batch.inputs, use_cache=False).logits
        with gate.around(batch):
            return handle.model(**batch.inputs, use_cache=False).logits


def scores_of(editor: Elder, what: list[Ask], side: Any, answers: list[list[int]] | None = None) -> torch.Tensor:
    batch = collate(editor.handle, what, answers, side=side)
    kept: list[torch.Tensor] = []
    with torch.no_grad(), editor.handle.hooked(editor.targets[0].module, lambda m, args: kept.append(args[0]), pre=True):
        editor.handle.model(**batch.inputs, use_cache=False)
    return editor.mixture.log_scores(last_position(kept[0].reshape(*batch.prompt.shape, -1), batch))


def scores_x(editor: Elder, e: EditEvent) -> torch.Tensor:
    batch = collate(editor.handle, [e.ask()])
    kept: list[torch.Tensor] = []
    with torch.no_grad(), editor.handle.hooked(editor.targets[0].module, lambda m, args: kept.append(args[0]), pre=True):
        editor.handle.model(**batch.inputs, use_cache=False)
    return last_position(kept[0], batch)
