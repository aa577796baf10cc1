"""Partial forwards give what the reference gives, the whole model at every call: logits, gradients, losses, edits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from testbed.bench.reference import WholeModelDownProjection, whole_model
from testbed.editors.codebook.balancedit import EntryWeights, FullCopyWeights, LowRankWeights, train
from testbed.model.encoding import answer_ids, collate
from testbed.model.handle import ModelHandle, project
from testbed.model.suffix import DownProjectionSuffix, suffix_from_down_projection, suffix_from_layer
from tests.helpers.balancedit_checks import ASKS, EDITS, TARGETS, batch, make
from tests.helpers.models import KINDS, build
from tests.helpers.suffix_rows import ANSWERS, asks


def both(kind: str, layer: int) -> tuple[ModelHandle, DownProjectionSuffix, DownProjectionSuffix]:
    handle = build(kind)
    fast = suffix_from_down_projection(handle, asks(kind), ANSWERS, layer)
    with whole_model(handle):
        slow = suffix_from_down_projection(handle, asks(kind), ANSWERS, layer)
    assert isinstance(slow, WholeModelDownProjection) and not isinstance(fast, WholeModelDownProjection)
    assert not isinstance(suffix_from_down_projection(handle, asks(kind), ANSWERS, layer), WholeModelDownProjection)
    return handle, fast, slow


@pytest.mark.parametrize("layer", [0, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_the_reference(kind: str, layer: int) -> None:
    handle, *suffixes = both(kind, layer)
    weight = handle.parameter(handle.down_weight(layer)).detach()
    got = []
    for suffix in suffixes:
        w = (weight + 0.1).clone().requires_grad_(True)
        loss = suffix.losses(lambda act, w=w: project(handle.down(layer), act, w))
        loss.sum().backward()
        got.append((loss.detach(), w.grad))
    torch.testing.assert_close(got[0][0], got[1][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[0][1], got[1][1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("kind", ["llava", "gpt2", "opt"])
def test_layers_above_are_those_of_the_whole_model(kind: str) -> None:
    handle = build(kind)
    rows = collate(handle, asks(kind), [answer_ids(handle, a, x) for a, x in zip(asks(kind), ANSWERS)], end=True)
    fast = suffix_from_layer(handle, rows, 1, 2)
    with whole_model(handle):
        slow = suffix_from_layer(handle, rows, 1, 2)
    hidden, before = fast.hidden + 0.1, hooks(handle)
    for above in (fast, slow):
        assert torch.equal(above.run(hidden, 1, 1), hidden)
    torch.testing.assert_close(fast.run(hidden, 1, 3), slow.run(hidden, 1, 3))
    torch.testing.assert_close(fast.layer(2, hidden), slow.layer(2, hidden))
    assert hooks(handle) == before


def hooks(handle: ModelHandle) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in handle.model.modules())


@pytest.mark.parametrize("family", ["full", "rank 2"])
@pytest.mark.parametrize("layer", [0, -1])
def test_training_has_the_same_losses_at_every_step_alone_and_in_a_batch(layer: int, family: str) -> None:
    handle = build("llava")
    module, weight = handle.down(layer), handle.parameter(handle.down_weight(layer)).detach()
    form: EntryWeights = FullCopyWeights(module, weight) if family == "full" else LowRankWeights(module, weight, 2)
    fresh = [form.fresh(torch.Generator().manual_seed(i)) for i in range(4)]
    for steps in (1, 5, 20):
        _, together = train(form, suffix_from_down_projection(handle, ASKS, list(TARGETS), layer), fresh, 0.01, steps)
        for i, one in enumerate(together):
            with whole_model(handle):
                suffix = suffix_from_down_projection(handle, ASKS[i : i + 1], [TARGETS[i]], layer)
            _, alone = train(form, suffix, fresh[i : i + 1], 0.01, steps)
            assert one == pytest.approx(alone[0], abs=1e-4)
            assert steps == 20 or one > 1e-3  # far from zero: agreement means something


def test_an_editor_needs_to_know_nothing_of_the_reference() -> None:
    fast, slow = make(), make()
    first: Any = fast.apply(batch(EDITS))
    with whole_model(slow.handle):
        second: Any = slow.apply(batch(EDITS))
    assert first.notes["loss"] == pytest.approx(second.notes["loss"], abs=1e-4)
    for i, v in fast.tensors.items():
        torch.testing.assert_close(v, slow.tensors[i], atol=1e-3, rtol=1e-3)
