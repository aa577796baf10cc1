"""A picture's token positions, run once: activations, losses and gradients are the whole model's in every image-text family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from testbed.bench.reference import whole_model
from testbed.core.events import Ask
from testbed.editors.codebook import keys
from testbed.model.encoding import Batch
from testbed.model.handle import ModelHandle, project
from testbed.model.loading import load
from testbed.model.prefix_cache import ImagePrefixes, decoder_of
from testbed.model.suffix import mean_over_prompt, suffix_from_down_projection
from tests.helpers.models import IMAGE, TEXT, Noise, build
from tests.helpers.positions_run import places

ASKS = [
    Ask("what colour is the ship?", Noise(1)),
    Ask("who leads the northern harbour, after all these years?", Noise(1)),
    Ask("what?", Noise(2)),
    Ask("what colour is the ship?", Noise(3, 64, 32)),
]
ANSWERS = ["green", "Mara Venn", "two red towers", "blue"]


def prefixes_of(handle: ModelHandle, layer: int = -1, **more: Any) -> ImagePrefixes:
    return ImagePrefixes(handle, handle.down(layer), **more)


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("kind", IMAGE)
def test_activations_are_those_of_the_whole_model(kind: str, layer: int) -> None:
    handle = build(kind)
    own = prefixes_of(handle, layer)
    batch = own.collate(ASKS)
    with whole_model(handle):
        want = own.activations(batch)
    for _ in range(2):  # made, then kept
        got = own.activations(batch)
        torch.testing.assert_close(got[batch.prompt], want[batch.prompt], rtol=1e-4, atol=1e-4)
    assert handle.cache["takes image prefixes"] is True


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_takes_image_prefixes(dtype: str) -> None:
    handle = load(str(build("llava").name), device="cpu", dtype=dtype)
    own = prefixes_of(handle)
    batch = own.collate(ASKS)
    with whole_model(handle):
        want = own.activations(batch)[batch.prompt].float()
    got = own.activations(batch)[batch.prompt].float()
    assert handle.cache["takes image prefixes"] is True
    assert (got - want).norm() < 0.05 * want.norm()


@pytest.mark.parametrize("kind", IMAGE)
def test_a_prompt_has_the_same_key_alone_and_among_others(kind: str) -> None:
    own = prefixes_of(build(kind))
    for key in (mean_over_prompt, keys.last_position, keys.mean_over_image):
        together = keys.read_keys(own, ASKS, key)
        for i, ask in enumerate(ASKS):
            alone = keys.read_keys(prefixes_of(own.handle), [ask], key)[0]
            torch.testing.assert_close(together[i], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", IMAGE)
def test_a_suffix_behind_image_prefixes_has_the_losses_and_gradients_of_one_without(kind: str) -> None:
    handle = build(kind)
    weight = handle.parameter(handle.down_weight(-1)).detach()
    found = []
    for kept in (None, prefixes_of(handle)):
        suffix = suffix_from_down_projection(handle, ASKS, ANSWERS, -1, prefixes=kept)
        own = weight.clone().requires_grad_(True)
        loss = suffix.losses(lambda act, own=own: project(handle.down(-1), act, own))
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), own)))
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_picture_is_run_once_and_its_words_alone_after_that() -> None:
    handle = build("llava")
    own = prefixes_of(handle)
    own.activations(own.collate(ASKS[:2]))  # looks at the decoder
    own.kept.clear()
    batch = own.collate(ASKS[:2])
    columns, column = batch.prompt.shape[1], own._length(ASKS[0])
    with places(handle) as seen:
        own.activations(batch)
        own.activations(batch)
        suffix_from_down_projection(handle, ASKS[:1], ANSWERS[:1], -1, prefixes=own)
    words = 2 * (columns - column)
    assert seen[:3] == [column, words, words]
    assert len(seen) == 4
    assert seen[3] < column


@pytest.mark.parametrize("kept", [0, 1])
def test_prefixes_that_do_not_fit_are_made_again(kept: int) -> None:
    handle = build("llava")
    free = prefixes_of(handle)
    want = keys.read_keys(free, ASKS, mean_over_prompt)
    one = next(iter(free.kept.values())).bytes
    tight = prefixes_of(handle, limit=kept * one)
    torch.testing.assert_close(keys.read_keys(tight, ASKS, mean_over_prompt), want, rtol=1e-5, atol=1e-5)
    assert len(tight.kept) == kept
    assert kept == 0 or next(iter(tight.kept))[0] == ASKS[-1].image.key  # pyright: ignore[reportOptionalMemberAccess]


def test_the_longest_unused_leaves_first() -> None:
    own = prefixes_of(build("llava"))
    keys.read_keys(own, ASKS[:3], mean_over_prompt)
    own.limit = 2 * next(iter(own.kept.values())).bytes
    for ask in (ASKS[0], ASKS[3]):
        keys.read_keys(own, [ask, ask], mean_over_prompt)
    assert [name[0] for name in own.kept] == [a.image.key for a in (ASKS[0], ASKS[3]) if a.image]


def test_pictures_that_occur_once_run_all_positions() -> None:
    own = prefixes_of(build("llava"))
    batch = own.collate([ASKS[0], *ASKS[2:]])
    with places(own.handle) as seen:
        own.activations(batch)
    assert seen == [batch.prompt.numel()]
    assert own.kept == {}


def test_text_and_mixed_rows_run_all_positions() -> None:
    for kind in (TEXT[0], "llava"):
        handle = build(kind)
        own = prefixes_of(handle)
        rows = [Ask("what colour is the ship?"), ASKS[0] if kind == "llava" else Ask("who leads?")]
        batch = own.collate(rows)
        with places(handle) as seen:
            act = own.activations(batch)
        assert seen == [batch.prompt.numel()]
        assert act.shape[:2] == batch.prompt.shape
        assert own.kept == {}


def check_all_positions_run(own: ImagePrefixes) -> None:
    """What image prefixes would give was found to be something else, and the whole model's activations are given."""
    batch = own.collate(ASKS)
    got = own.activations(batch)
    assert own.handle.cache["takes image prefixes"] is False
    with whole_model(own.handle):
        torch.testing.assert_close(got, own.activations(batch), rtol=0, atol=0)


def test_a_decoder_that_gives_something_else_behind_a_prefix_runs_all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = load(str(build("llava").name), device="cpu")
    own = prefixes_of(handle)
    words = ImagePrefixes._run_words

    def wrong(self: ImagePrefixes, batch: Batch, kept: Any) -> None:
        ids = batch.inputs["input_ids"].flip(1)
        words(self, replace(batch, inputs={**batch.inputs, "input_ids": ids}), kept)

    monkeypatch.setattr(ImagePrefixes, "_run_words", wrong)
    check_all_positions_run(own)


def test_a_decoder_that_names_no_cache_runs_all_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = load(str(build("llava").name), device="cpu")
    own, decoder = prefixes_of(handle), decoder_of(handle)
    forward = decoder.forward

    def without(**kwargs: Any) -> Any:
        return forward(**{k: v for k, v in kwargs.items() if k != "past_key_values"})

    monkeypatch.setattr(decoder, "forward", without)
    check_all_positions_run(own)


def test_nothing_is_learned_of_a_decoder_whose_activations_are_not_finite() -> None:
    handle = load(str(build("llava").name), device="cpu")
    own = prefixes_of(handle)
    name = handle.down_weight(0)
    broken: Tensor = torch.full_like(handle.parameter(name), torch.nan)
    with handle.swapped({name: broken}):
        assert not torch.isfinite(own.activations(own.collate(ASKS))).all()
    assert "takes image prefixes" not in handle.cache
