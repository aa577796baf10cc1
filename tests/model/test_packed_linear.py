"""Packed weights give the products of the plain ones, forward and back, and leave the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from streams.base import StreamConfig
from testbed.bench.editors import apply_steps, largest_difference
from testbed.core.events import Ask
from testbed.core.registry import EDITORS, STREAMS
from testbed.model import packed_linear
from testbed.model.encoding import answer_ids, collate
from testbed.model.handle import ModelHandle
from testbed.model.loading import load
from testbed.model.packed_linear import AVAILABLE, packed_layers
from testbed.model.suffix import suffix_from_layer
from tests.helpers.models import folder

needs_onednn = pytest.mark.skipif(not AVAILABLE, reason="this build of torch has no oneDNN")


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of the tests have small weights alone."""
    monkeypatch.setattr(packed_linear, "_LEAST", 0)


def linear_maps(handle: ModelHandle, first: int = 0) -> list[nn.Linear]:
    return [m for layer in handle.layers[first:] for m in layer.modules() if type(m) is nn.Linear]


def loss_and_gradient(handle: ModelHandle, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    asks, answers = [Ask("the small lamp stands beside"), Ask("a red circle")], [" the river", " a blue square"]
    batch = collate(handle, asks, [answer_ids(handle, a, x) for a, x in zip(asks, answers)], end=True)
    suffix = suffix_from_layer(handle, batch, first)
    hidden = suffix.hidden.detach().clone().requires_grad_(True)
    losses = suffix.answer_losses(suffix.final_hidden(suffix.run(hidden)))
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    return losses.detach(), gradient


@needs_onednn
@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt", "gpt_neox"])
def test_losses_and_gradients_are_those_of_the_plain_weights(kind: str) -> None:
    handle = load(str(folder(kind)))
    plain = loss_and_gradient(handle, 0)
    with packed_layers(handle, 0):
        assert all("forward" in m.__dict__ for m in linear_maps(handle))
        packed = loss_and_gradient(handle, 0)
    for a, b in zip(plain, packed):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not any("forward" in m.__dict__ for m in linear_maps(handle))


@pytest.mark.skipif(not packed_linear.QUICK_BFLOAT16, reason="this processor has neither AVX-512 BF16 nor AMX")
def test_products_in_bfloat16_are_rounded_and_leave_float32_activations() -> None:
    handle = load(str(folder("llama")))
    plain = loss_and_gradient(handle, 0)
    with packed_layers(handle, 0, torch.bfloat16):
        rounded = loss_and_gradient(handle, 0)
    with packed_layers(handle, 0):
        exact = loss_and_gradient(handle, 0)
    for a, b, c in zip(plain, rounded, exact):
        assert b.dtype == torch.float32
        assert not torch.equal(b, c)
        assert float((a - b).norm() / a.norm()) < 0.05
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)  # both orders of a weight are kept beside each other


@needs_onednn
def test_small_weights_stay_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = load(str(folder("llama")))
    monkeypatch.setattr(packed_linear, "_LEAST", 1 + max(m.weight.numel() for m in linear_maps(handle)))
    with packed_layers(handle, 0):
        assert not any("forward" in m.__dict__ for m in linear_maps(handle))


@needs_onednn
def test_layers_below_and_maps_of_another_kind_stay_plain() -> None:
    handle = load(str(folder("llama")))
    with packed_layers(handle, 1):
        assert not any("forward" in m.__dict__ for m in handle.layers[0].modules())
        assert any("forward" in m.__dict__ for m in handle.layers[1].modules())
    gpt2 = load(str(folder("gpt2")))  # keeps its weights in `Conv1D`
    with packed_layers(gpt2, 0):
        assert not any("forward" in m.__dict__ for layer in gpt2.layers for m in layer.modules())


@needs_onednn
def test_a_swapped_weight_is_used_whether_it_was_packed_or_the_base_was() -> None:
    for swapped_first in (True, False):
        handle = load(str(folder("llama")))
        name = handle.down_weight(0)
        other = handle.parameter(name).detach() * 2
        if not swapped_first:
            with packed_layers(handle, 0):
                pass
        with handle.swapped({name: other}):
            plain = loss_and_gradient(handle, 0)
            with packed_layers(handle, 0):
                packed = loss_and_gradient(handle, 0)
        torch.testing.assert_close(plain[0], packed[0], rtol=1e-4, atol=1e-5)
        base = loss_and_gradient(handle, 0)
        with packed_layers(handle, 0):
            torch.testing.assert_close(base[0], loss_and_gradient(handle, 0)[0], rtol=1e-4, atol=1e-5)


@needs_onednn
def test_no_more_than_the_limit_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = load(str(folder("llama")))
    first = linear_maps(handle)[0]
    monkeypatch.setattr(packed_linear, "_MOST", 2 * first.weight.nbytes + 1)
    with packed_layers(handle, 0):
        assert [m for m in linear_maps(handle) if "forward" in m.__dict__] == [first]


@pytest.mark.parametrize("name", ["elder", "lora", "lora-yearly", "wise", "finetune"])
def test_every_training_loss_is_the_reference_implementations(name: str) -> None:
    handle, stream = load("tiny"), STREAMS.get("world-yearly")(StreamConfig())
    cls = EDITORS.get(name)
    settings = {"steps": 8} | ({"layer": 1} if "layer" in vars(cls.Config()) else {})
    edits = [[e] for e in stream.events(6) if e.kind == "add"][:3]
    plain, ours = (apply_steps(handle, stream, cls(cls.Config(**settings)), edits, reference=way) for way in (True, False))
    assert plain.failed == ours.failed == 0
    assert len(ours.losses[0]) >= 8
    difference = largest_difference(plain.losses, ours.losses)
    assert difference is not None
    assert difference < 1e-4
