"""A picture's places, run once: the same activations, losses and gradients as the whole model's, in every family that reads pictures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from testbed.core.events import Ask
from testbed.editors.codebook import keys as _sites
from testbed.model.decoder import decoder_of
from testbed.model.encoding import Batch
from testbed.model.handle import ModelHandle, load, project
from testbed.model.prefix_cache import Stems
from testbed.model.reference_mode import plain
from testbed.model.suffix import capture
from tests.helpers.models import IMAGE, TEXT, Noise, build
from tests.helpers.positions_run import places

ASKS = [
    Ask("what colour is the ship?", Noise(1)),
    Ask("who leads the northern harbour, after all these years?", Noise(1)),
    Ask("what?", Noise(2)),
    Ask("what colour is the ship?", Noise(3, 64, 32)),
]
ANSWERS = ["green", "Mara Venn", "two red towers", "blue"]


def stems(handle: ModelHandle, layer: int = -1, **more: Any) -> Stems:
    return Stems(handle, handle.down(layer), **more)


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("kind", IMAGE)
def test_activations_are_those_of_the_whole_model(kind: str, layer: int) -> None:
    handle = build(kind)
    own = stems(handle, layer)
    batch = own.collate(ASKS)
    with plain():
        want = own.acts(batch)
    for _ in range(2):  # made, then kept
        got = own.acts(batch)
        torch.testing.assert_close(got[batch.prompt], want[batch.prompt], rtol=1e-4, atol=1e-4)
    assert handle.cache["takes stems"] is True


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_takes_stems(dtype: str) -> None:
    handle = load(str(build("llava").name), device="cpu", dtype=dtype)
    own = stems(handle)
    batch = own.collate(ASKS)
    with plain():
        want = own.acts(batch)[batch.prompt].float()
    got = own.acts(batch)[batch.prompt].float()
    assert handle.cache["takes stems"] is True
    assert (got - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("kind", IMAGE)
def test_a_prompt_has_the_same_key_alone_and_among_others(kind: str) -> None:
    own = stems(build(kind))
    for key in (_sites.mean, _sites.last, _sites.over_picture):
        together = _sites.read(own, ASKS, key)
        for i, ask in enumerate(ASKS):
            alone = _sites.read(stems(own.handle), [ask], key)[0]
            torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", IMAGE)
def test_a_tail_behind_stems_has_the_losses_and_gradients_of_one_without(kind: str) -> None:
    handle = build(kind)
    weight = handle.parameter(handle.down_weight(-1)).detach()
    found = []
    for kept in (None, stems(handle)):
        tail = capture(handle, ASKS, ANSWERS, -1, stems=kept)
        own = weight.clone().requires_grad_(True)
        loss = tail.loss(lambda act, own=own: project(handle.down(-1), act, own))
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), own)))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_picture_is_run_once_and_its_words_alone_after_that() -> None:
    handle = build("llava")
    own = stems(handle)
    own.acts(own.collate(ASKS[:2]))  # looks at the decoder
    own.kept.clear()
    batch = own.collate(ASKS[:2])
    columns, column = batch.prompt.shape[1], own._length(ASKS[0])
    with places(handle) as seen:
        own.acts(batch)
        own.acts(batch)
        capture(handle, ASKS[:1], ANSWERS[:1], -1, stems=own)
    words = 2 * (columns - column)
    assert seen[:3] == [column, words, words]
    assert len(seen) == 4
    assert seen[3] < column


@pytest.mark.parametrize("room", [0, 1])
def test_stems_that_do_not_fit_are_made_again(room: int) -> None:
    handle = build("llava")
    free = stems(handle)
    want = _sites.read(free, ASKS, _sites.mean)
    one = next(iter(free.kept.values())).bytes
    tight = stems(handle, limit=room * one)
    torch.testing.assert_close(_sites.read(tight, ASKS, _sites.mean), want, rtol=1e-5, atol=1e-5)
    assert len(tight.kept) == room
    assert room == 0 or next(iter(tight.kept))[0] == ASKS[-1].image.key  # pyright: ignore[reportOptionalMemberAccess]


def test_the_longest_unused_leaves_first() -> None:
    own = stems(build("llava"))
    _sites.read(own, ASKS[:3], _sites.mean)
    own.limit = 2 * next(iter(own.kept.values())).bytes
    for ask in (ASKS[0], ASKS[3]):
        _sites.read(own, [ask, ask], _sites.mean)
    assert [name[0] for name in own.kept] == [a.image.key for a in (ASKS[0], ASKS[3]) if a.image]


def test_pictures_that_are_there_once_are_run_whole() -> None:
    own = stems(build("llava"))
    batch = own.collate([ASKS[0], *ASKS[2:]])
    with places(own.handle) as seen:
        own.acts(batch)
    assert seen == [batch.prompt.numel()]
    assert own.kept == {}


def test_text_and_mixed_rows_are_run_whole() -> None:
    for kind in (TEXT[0], "llava"):
        handle = build(kind)
        own = stems(handle)
        rows = [Ask("what colour is the ship?"), ASKS[0] if kind == "llava" else Ask("who leads?")]
        batch = own.collate(rows)
        with places(handle) as seen:
            act = own.acts(batch)
        assert seen == [batch.prompt.numel()]
        assert act.shape[:2] == batch.prompt.shape
        assert own.kept == {}


def runs_whole(own: Stems) -> None:
    """What stems would give was found to be something else, and the whole model's activations are given."""
    batch = own.collate(ASKS)
    got = own.acts(batch)
    assert own.handle.cache["takes stems"] is False
    with plain():
        torch.testing.assert_close(got, own.acts(batch), rtol=0, atol=0)


def test_a_decoder_that_gives_something_else_behind_a_stem_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = load(str(build("llava").name), device="cpu")
    own = stems(handle)
    words = Stems._words

    def wrong(self: Stems, batch: Batch, kept: Any) -> None:
        ids = batch.inputs["input_ids"].flip(1)
        words(self, replace(batch, inputs={**batch.inputs, "input_ids": ids}), kept)

    monkeypatch.setattr(Stems, "_words", wrong)
    runs_whole(own)


def test_a_decoder_that_names_no_past_is_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = load(str(build("llava").name), device="cpu")
    own, decoder = stems(handle), decoder_of(handle)
    forward = decoder.forward

    def without(**kwargs: Any) -> Any:
        return forward(**{k: v for k, v in kwargs.items() if k != "past_key_values"})

    monkeypatch.setattr(decoder, "forward", without)
    runs_whole(own)


def test_nothing_is_learned_of_a_decoder_whose_activations_are_not_finite() -> None:
    handle = load(str(build("llava").name), device="cpu")
    own = stems(handle)
    name = handle.down_weight(0)
    broken: Tensor = torch.full_like(handle.parameter(name), torch.nan)
    with handle.swapped({name: broken}):
        assert not torch.isfinite(own.acts(own.collate(ASKS))).all()
    assert "takes stems" not in handle.cache
