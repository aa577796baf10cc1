"""The codebook promises that need a model, each as a check of an editor class: the true one passes, a fault fails."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch, EditEvent, Question
from testbed.editors.codebook.balancedit import BalancEdit, BalancEditConfig
from testbed.editors.codebook.gate import Gate
from testbed.editors.codebook.keys import read_keys
from testbed.model.encoding import collate
from testbed.model.handle import weights_hash
from testbed.model.prefix_cache import ImagePrefixes
from tests.helpers.models import Noise, build

Make = Callable[..., BalancEdit]
POOL = TrainPool((Question("general", "what is two plus two?", "four"), Question("general", "who paints?", "Mara", image=Noise(90))))
PROMPTS = ("what colour is the ship in the harbour?", "who leads?", "what stands beside the old bridge and the river?", "how many towers?")
TARGETS = ("green", "Mara Venn", "two red towers", "three")
PARAPHRASES = ("tell me {}", "please say {}")
FAR = Ask("name the yellow stars", Noise(77))


def edit(i: int, target: str | None = None, image: Any = None, prompt: str | None = None) -> EditEvent:
    return EditEvent("add", 1.0, i, prompt or PROMPTS[i % 4], target or TARGETS[i % 4], image or Noise(i + 1), source=f"{i}-{target}")


EDITS = [edit(i) for i in range(4)]
ASKS = [e.ask() for e in EDITS]


def batch(events: list[EditEvent], step: int = 1) -> EditBatch:
    return EditBatch(tuple(events), step, {e.id: tuple(p.format(e.prompt) for p in PARAPHRASES) for e in events})


def make(cls: type[BalancEdit] = BalancEdit, kind: str = "llava", **config: Any) -> BalancEdit:
    editor = cls(cls.Config(**{"steps": 12, "lr": 0.02, "w_pos": 1.0, **config}))
    editor.prepare(build(kind), POOL)
    return editor


def edited(cls: type[BalancEdit] = BalancEdit, n: int = 4, **config: Any) -> BalancEdit:
    """One edit a step."""
    editor = make(cls, **config)
    for i, e in enumerate(EDITS[:n], 1):
        editor.apply(batch([e], i))
    return editor


@torch.no_grad()
def logits(editor: BalancEdit, asks: list[Ask], gate: Gate | None = None) -> tuple[torch.Tensor, list[str | None]]:
    """Of the last position, and the entries that fired."""
    around = gate or editor.gate(editor.book)
    one = collate(editor.handle, asks, side="left")
    with around.around(one):
        out = editor.handle.model(**one.inputs).logits[:, -1]
    return out, fired(around, one)


def fired(gate: Gate, one: Any) -> list[str | None]:
    return [x.get("entry") for x in gate.explain(one)]


@torch.no_grad()
def tokens(editor: BalancEdit, asks: list[Ask], beams: int = 1, cache: bool = True) -> list[list[int]]:
    gate = editor.gate(editor.book)
    one = collate(editor.handle, asks, side="left")
    with gate.around(one):
        out = editor.handle.model.generate(
            **one.inputs, max_new_tokens=6, min_new_tokens=6, num_beams=beams, use_cache=cache, do_sample=False
        )
    return out[:, one.inputs["input_ids"].shape[1] :].tolist()


def check_01_deferral_is_identity(cls: type[BalancEdit]) -> None:
    editor, empty = edited(cls), make()
    got, entries = logits(editor, [*ASKS, FAR])
    assert entries == [*(e.id for e in EDITS), None]
    assert torch.equal(got[-1], logits(empty, [*ASKS, FAR])[0][-1])
    assert not torch.equal(got[0], logits(empty, [*ASKS, FAR])[0][0])
    assert tokens(editor, [FAR]) == tokens(empty, [FAR])


def check_04_disabled_is_the_base(cls: type[BalancEdit]) -> None:
    editor = edited(cls, 2)
    gate = editor.gate(editor.book)
    before, entries = logits(editor, ASKS, gate)
    gate.enabled = False
    assert torch.equal(logits(editor, ASKS, gate)[0], logits(make(), ASKS)[0])
    gate.enabled = True
    again, same = logits(editor, ASKS, gate)
    assert torch.equal(before, again) and entries == same


def check_05_the_base_is_never_written(cls: type[BalancEdit]) -> None:
    before = weights_hash(build("llava").model)
    editor = edited(cls, 2)
    logits(editor, ASKS)
    editor.revert([EDITS[0].id])
    editor.load_state_dict(editor.state_dict())
    assert weights_hash(build("llava").model) == before


def check_06_earlier_edits_stay(cls: type[BalancEdit]) -> None:
    assert logits(edited(cls), ASKS)[1] == [e.id for e in EDITS]


def check_24_batched_is_one_by_one(cls: type[BalancEdit]) -> None:
    editor = edited(cls)
    asks = [*ASKS, FAR]
    alone = [logits(editor, [a])[1][0] for a in asks]
    assert alone == [*(e.id for e in EDITS), None]
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        assert logits(editor, [asks[i] for i in order])[1] == [alone[i] for i in order]


def check_25_padding_changes_no_key(cls: type[BalancEdit], **config: Any) -> None:
    editor = make(cls, **config)
    together = editor._read(ASKS)
    for side in ("left", "right"):
        for i, a in enumerate(ASKS):
            one, kept = collate(editor.handle, [a, ASKS[2]], side=side), []
            with editor.handle.hooked(editor.module, lambda m, args, kept=kept: kept.append(args[0]), pre=True):
                editor.handle.model(**one.inputs)
            key = editor._key(kept[0].reshape(*one.prompt.shape, -1), one)[0]
            torch.testing.assert_close(key, together[i], atol=1e-4, rtol=1e-4)
            alone = read_keys(ImagePrefixes(editor.handle, editor.module), [a], editor._key)[0]
            torch.testing.assert_close(alone, together[i], atol=1e-4, rtol=1e-4)


def check_29_nothing_global_is_touched(cls: type[BalancEdit], out: Callable[[], str]) -> None:
    editor = edited(cls, 1)
    rng, env = (torch.get_rng_state(), np.random.get_state()[1].copy()), dict(os.environ)  # noqa: NPY002
    logits(editor, ASKS)
    editor.apply(batch([EDITS[1]], 2))
    assert torch.equal(rng[0], torch.get_rng_state())
    assert np.array_equal(rng[1], np.random.get_state()[1])  # noqa: NPY002
    assert dict(os.environ) == env
    assert out() == ""


def check_30_decided_at_prefill(cls: type[BalancEdit], beams: int = 1) -> None:
    editor = edited(cls)
    asks = [*ASKS, FAR]
    cached = tokens(editor, asks, beams)
    assert cached == tokens(editor, asks, beams, cache=False)
    assert cached == [tokens(editor, [a], beams)[0] for a in asks]
    assert cached[4] == tokens(make(), [FAR], beams)[0]
    assert cached[:4] != tokens(make(), ASKS, beams)


def check_31_the_scope_is_free_of_the_answer(cls: type[BalancEdit]) -> None:
    a, b = make(cls), make(cls)
    a.apply(batch([edit(0, "green")]))
    b.apply(batch([edit(0, "two red towers")]))
    assert torch.equal(a.book.keys, b.book.keys)
    assert torch.equal(a.book.raw, b.book.raw)


def check_33_values_are_isolated(cls: type[BalancEdit]) -> None:
    editor = edited(cls, 2)
    before, entries = logits(editor, ASKS[:2])
    editor.apply(batch(EDITS[2:], 3))
    after, same = logits(editor, ASKS[:2])
    assert entries == same == [EDITS[0].id, EDITS[1].id]
    assert torch.equal(before, after)


def config(**changes: Any) -> BalancEditConfig:
    return BalancEditConfig(**changes)
