"""The suffix of a model equals the whole model, under its own weight and under any other, with the same gradient."""

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
from testbed.model.handle import ModelHandle, project
from testbed.model.layout import adds_as_it_is, layout_verified, verify_layout
from testbed.model.loading import load
from testbed.model.suffix import DownProjectionSuffix, WithinLayerSuffix, suffix_from_down_projection
from tests.helpers.models import KINDS, TEXT, Noise, build, save

PROMPTS = ("who?", "what colour is the ship in the northern harbour?", "who leads the bridge?")
ANSWERS = ["green", "Mara Venn", "two red towers"]


def captured(handle: ModelHandle, kind: str, layer: int, end: bool = True) -> DownProjectionSuffix:
    pictures = [None, None, None] if kind in TEXT else [Noise(1), None, Noise(2, 32, 64)]
    return suffix_from_down_projection(handle, [Ask(p, x) for p, x in zip(PROMPTS, pictures)], ANSWERS, layer, end)


def through(handle: ModelHandle, layer: int, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda act: project(handle.down(layer), act, weight)


def rows_of(suffix: DownProjectionSuffix) -> torch.Tensor:
    """(n,) the batch row of each answer token."""
    return suffix.batch.before_answer.nonzero()[:, 0]


@torch.no_grad()
def whole(suffix: DownProjectionSuffix) -> torch.Tensor:
    return suffix.upper.handle.model(**suffix.batch.inputs).logits[suffix.batch.before_answer]


def other_weight(handle: ModelHandle, layer: int) -> torch.Tensor:
    weight = handle.parameter(handle.down_weight(layer)).detach()
    return weight + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_whole_model_under_its_own_and_under_another_weight(kind: str, layer: int) -> None:
    handle = build(kind)
    suffix, other = captured(handle, kind, layer), other_weight(handle, layer)
    own = suffix.logits(through(handle, layer, handle.parameter(handle.down_weight(layer))))
    torch.testing.assert_close(own, whole(suffix), atol=1e-4, rtol=1e-4)
    with handle.swapped({handle.down_weight(layer): other}):
        want = whole(suffix)
    assert (want - own).abs().max() > 0.1
    torch.testing.assert_close(suffix.logits(through(handle, layer, other)), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("kind", ["llava", "gpt2"])
def test_gradient_equals_that_of_the_whole_model(kind: str, layer: int) -> None:
    handle = build(kind)
    suffix, name = captured(handle, kind, layer), handle.down_weight(layer)
    weight = handle.parameter(name).detach().clone().requires_grad_(True)
    suffix.losses(through(handle, layer, weight)).sum().backward()
    again = weight.detach().clone().requires_grad_(True)
    out: Any = functional_call(handle.model, {name: again}, kwargs=dict(suffix.batch.inputs))
    nll = -out.logits[suffix.batch.before_answer].log_softmax(-1).gather(1, suffix.batch.answer_ids[:, None])[:, 0]
    torch.stack([nll[rows_of(suffix) == i].mean() for i in range(3)]).sum().backward()
    assert weight.grad is not None
    assert again.grad is not None
    assert again.grad.abs().max() > 1e-3
    torch.testing.assert_close(weight.grad, again.grad, atol=1e-5, rtol=1e-3)
    assert handle.parameter(name).grad is None


def test_end_token_is_trained_only_where_asked() -> None:
    handle = build("llama")
    with_end, without = captured(handle, "llama", -1), captured(handle, "llama", -1, end=False)
    assert len(with_end.batch.answer_ids) == len(without.batch.answer_ids) + 3
    assert torch.equal(torch.bincount(rows_of(with_end)), torch.bincount(rows_of(without)) + 1)
    ends = with_end.batch.answer_ids[torch.bincount(rows_of(with_end)).cumsum(0) - 1]
    assert set(ends.tolist()) == {handle.tokenizer.eos_token_id}


def test_a_suffix_leaves_no_hook_and_changes_no_weight() -> None:
    handle = build("opt")
    captured(handle, "opt", 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in handle.model.modules())
    from testbed.model.handle import weights_hash

    assert weights_hash(handle.model) == handle.hash


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_dtypes(dtype: str, tmp_path: Path) -> None:
    save("llama", tmp_path)
    handle = load(str(tmp_path), device="cpu", dtype=dtype)
    suffix = captured(handle, "llama", 0)
    own = suffix.logits(through(handle, 0, handle.parameter(handle.down_weight(0))))
    torch.testing.assert_close(own.float(), whole(suffix).float(), atol=0.2 if dtype == "bfloat16" else 1e-6, rtol=0.1)


@pytest.mark.parametrize("kind", ["falcon", "phi", "starcoder2"])
def test_layers_that_add_attention_and_mlp_together(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path)
    handle = load(str(tmp_path), device="cpu")
    suffix, other = captured(handle, "llama", 0), other_weight(handle, 0)
    with handle.swapped({handle.down_weight(0): other}):
        want = whole(suffix)
    torch.testing.assert_close(suffix.logits(through(handle, 0, other)), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gemma2", {}),
        ("olmo2", {}),
        ("granite", {"residual_multiplier": 0.5, "logits_scaling": 4.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_layers_that_do_more_than_add_and_logits_that_are_changed(kind: str, changes: dict[str, Any], layer: int, tmp_path: Path) -> None:
    save(kind, tmp_path, **changes)
    handle = load(str(tmp_path), device="cpu")
    suffix, other = captured(handle, "llama", layer), other_weight(handle, layer)
    assert adds_as_it_is(handle, layer) == (kind == "cohere")
    assert isinstance(suffix, WithinLayerSuffix) == (kind != "cohere")
    with handle.swapped({handle.down_weight(layer): other}):
        want = whole(suffix)
    assert (want - whole(suffix)).abs().max() > 0.1
    torch.testing.assert_close(suffix.logits(through(handle, layer, other)), want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize(("kind", "changes"), [("opt", {"word_embed_proj_dim": 32}), ("opt", {"do_layer_norm_before": False})])
def test_models_of_another_form_are_refused_by_name(kind: str, changes: dict[str, Any], layer: int, tmp_path: Path) -> None:
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
    suffix = captured(handle, "llama", -1)

    def verify(changed: DownProjectionSuffix) -> None:
        handle.cache.pop("verified layouts", None)
        logits = lambda weight: changed.logits(through(handle, -1, weight))  # noqa: E731
        verify_layout(handle, handle.n_layers - 1, suffix.batch, logits, "down-projection")

    spread = 1 + 0.02 * torch.randn(suffix.rest.shape, generator=torch.Generator().manual_seed(0))
    verify(dataclasses.replace(suffix, rest=(suffix.rest * spread).bfloat16()))
    assert layout_verified(handle, -1)
    for other in ({"act": 2 * suffix.act}, {"rest": 2 * suffix.rest}, {"rest": suffix.rest + suffix.rest.std()}):
        with pytest.raises(UnknownLayout, match="the logits are off by"):
            verify(dataclasses.replace(suffix, **other))
        assert not layout_verified(handle, -1)


def test_at_the_last_layer_only_positions_that_predict_an_answer_are_kept() -> None:
    handle = build("llama")
    suffix = captured(handle, "llama", -1)
    read = suffix.at(suffix.batch.before_answer)
    counts = suffix.batch.before_answer.sum(1)
    assert suffix.act.shape[:2] == (3, int(counts.max()))
    assert torch.equal(read.sum(1), counts)
    assert captured(handle, "llama", 0).act.shape[:2] == suffix.batch.prompt.shape
