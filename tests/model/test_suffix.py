"""The tail of a model equals the whole model, under its own weight and under any other, with the same gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.func import functional_call

from testbed.core.events import Ask
from testbed.model.families import UnknownLayout
from testbed.model.handle import ModelHandle, load, project
from testbed.model.suffix import Tail, _check, capture
from tests.helpers.models import KINDS, TEXT, Noise, build, save

PROMPTS = ("who?", "what colour is the ship in the northern harbour?", "who leads the bridge?")
ANSWERS = ["green", "Mara Venn", "two red towers"]


def captured(handle: ModelHandle, kind: str, layer: int, end: bool = True) -> Tail:
    pictures = [None, None, None] if kind in TEXT else [Noise(1), None, Noise(2, 32, 64)]
    return capture(handle, [Ask(p, x) for p, x in zip(PROMPTS, pictures)], ANSWERS, layer, end)


def through(handle: ModelHandle, layer: int, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda act: project(handle.down(layer), act, weight)


@torch.no_grad()
def whole(tail: Tail) -> torch.Tensor:
    return tail.handle.model(**tail.batch.inputs).logits[tail.batch.before_answer]


def other_weight(handle: ModelHandle, layer: int) -> torch.Tensor:
    weight = handle.parameter(handle.down_weight(layer)).detach()
    return weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_whole_model_under_its_own_and_under_another_weight(kind: str, layer: int) -> None:
    handle = build(kind)
    tail, other = captured(handle, kind, layer), other_weight(handle, layer)
    own = tail.logits(through(handle, layer, handle.parameter(handle.down_weight(layer))))
    torch.testing.assert_close(own, whole(tail), atol=1e-4, rtol=1e-4)
    with handle.swapped({handle.down_weight(layer): other}):
        want = whole(tail)
    assert (want - own).abs().max() > 0.1
    torch.testing.assert_close(tail.logits(through(handle, layer, other)), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("kind", ["llava", "gpt2"])
def test_gradient_equals_that_of_the_whole_model(kind: str, layer: int) -> None:
    handle = build(kind)
    tail, name = captured(handle, kind, layer), handle.down_weight(layer)
    weight = handle.parameter(name).detach().clone().requires_grad_(True)
    tail.loss(through(handle, layer, weight)).sum().backward()
    again = weight.detach().clone().requires_grad_(True)
    out: Any = functional_call(handle.model, {name: again}, kwargs=dict(tail.batch.inputs))
    nll = -out.logits[tail.batch.before_answer].log_softmax(-1).gather(1, tail.target[:, None])[:, 0]
    torch.stack([nll[tail.row == i].mean() for i in range(3)]).sum().backward()
    assert weight.grad is not None
    assert again.grad is not None
    assert again.grad.abs().max() > 1e-3
    torch.testing.assert_close(weight.grad, again.grad, atol=1e-5, rtol=1e-3)
    assert handle.parameter(name).grad is None


def test_end_token_is_trained_only_where_asked() -> None:
    handle = build("llama")
    with_end, without = captured(handle, "llama", -1), captured(handle, "llama", -1, end=False)
    assert len(with_end.target) == len(without.target) + 3
    assert torch.equal(torch.bincount(with_end.row), torch.bincount(without.row) + 1)
    ends = with_end.target[torch.bincount(with_end.row).cumsum(0) - 1]
    assert set(ends.tolist()) == {handle.tokenizer.eos_token_id}


def test_capture_leaves_no_hook_and_changes_no_weight() -> None:
    handle = build("opt")
    captured(handle, "opt", 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in handle.model.modules())
    from testbed.model.handle import weights_hash

    assert weights_hash(handle.model) == handle.hash


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype: str, tmp_path: Path) -> None:
    save("llama", tmp_path)
    handle = load(str(tmp_path), device="cpu", dtype=dtype)
    tail = captured(handle, "llama", 0)
    own = tail.logits(through(handle, 0, handle.parameter(handle.down_weight(0))))
    torch.testing.assert_close(own.float(), whole(tail).float(), atol=0.2 if dtype == "bfloat16" else 1e-6, rtol=0.1)


@pytest.mark.parametrize("kind", ["falcon", "phi", "starcoder2"])
def test_layers_that_add_attention_and_mlp_together(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path)
    handle = load(str(tmp_path), device="cpu")
    tail, other = captured(handle, "llama", 0), other_weight(handle, 0)
    with handle.swapped({handle.down_weight(0): other}):
        want = whole(tail)
    torch.testing.assert_close(tail.logits(through(handle, 0, other)), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma2", {}),
        ("olmo2", {}),
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"word_embed_proj_dim": 32}),
        ("granite", {"residual_multiplier": 0.5}),
        ("cohere", {}),
    ],
)
def test_layers_of_another_form_are_refused_by_name(kind: str, changes: dict[str, Any], layer: int, tmp_path: Path) -> None:
    save(kind, tmp_path, **changes)
    handle = load(str(tmp_path), device="cpu")
    before = handle.hash
    with pytest.raises(UnknownLayout, match=type(handle.model).__name__.removesuffix("ForCausalLM")):
        captured(handle, "llama", layer)
    with pytest.raises(UnknownLayout):
        captured(handle, "llama", layer)
    from testbed.model.handle import weights_hash

    assert weights_hash(handle.model) == before


def test_in_half_precision_rounding_below_a_layer_does_not_count_and_another_form_does(tmp_path: Path) -> None:
    save("llama", tmp_path)
    handle = load(str(tmp_path), device="cpu", dtype="bfloat16")
    tail = captured(handle, "llama", -1)
    spread = 1 + 0.02 * torch.randn(tail.rest.shape, generator=torch.Generator().manual_seed(0))
    assert _check(dataclasses.replace(tail, rest=(tail.rest * spread).bfloat16()))
    for other in ({"act": 2 * tail.act}, {"rest": 2 * tail.rest}, {"rest": tail.rest + tail.rest.std()}):
        with pytest.raises(UnknownLayout, match="its logits are off by"):
            _check(dataclasses.replace(tail, **other))
