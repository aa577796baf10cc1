"""Vectors in the place of a layer's output: behind the kept prompt, through the suffix and through the whole model, one loss."""

from __future__ import annotations

import pytest
import torch

from testbed.bench.reference import recorded_losses, whole_model
from testbed.editors.codebook.grace import at_last, at_prompt
from testbed.editors.codebook.keys import last_position, read_keys
from testbed.model.prefix_cache import ImagePrefixes
from tests.helpers.models import build
from tests.helpers.suffix_rows import ANSWERS, asks


@pytest.mark.parametrize("layer", [0, -2, -1])
@pytest.mark.parametrize("kind", ["llava", "gpt2", "opt", "qwen2_vl"])
def test_three_ways_to_one_loss_and_gradient(kind: str, layer: int) -> None:
    handle = build(kind)
    prefixes = ImagePrefixes(handle, handle.down(layer))
    entering = read_keys(prefixes, asks(kind), last_position)
    start = torch.rand(3, handle.width, generator=torch.Generator().manual_seed(0))
    got = []
    ways = [
        lambda: at_last(prefixes, asks(kind), ANSWERS, layer, entering),
        lambda: at_prompt(prefixes, asks(kind), ANSWERS, layer, last=True),
    ]
    with whole_model(handle):
        reference = ways[1]()
    ways.append(lambda: reference)
    for way in ways:
        vectors = start.clone().requires_grad_(True)
        losses = way()(vectors)
        losses.sum().backward()
        assert vectors.grad is not None
        got.append((losses.detach(), vectors.grad))
    for losses, grad in got[1:]:
        torch.testing.assert_close(got[0][0], losses, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(got[0][1], grad, atol=1e-4, rtol=1e-3)
    assert float(got[0][1].abs().max()) > 1e-4


def test_all_prompt_positions_differ_from_the_last_and_losses_can_be_recorded() -> None:
    handle = build("llava")
    vectors = torch.rand(3, handle.width, generator=torch.Generator().manual_seed(0))
    with recorded_losses() as seen:
        prefixes = ImagePrefixes(handle, handle.down(1))
        every, last = (at_prompt(prefixes, asks("llava"), ANSWERS, 1, last=last)(vectors) for last in (False, True))
    assert not torch.allclose(every, last)
    assert [torch.equal(a, b) for a, b in zip(seen, (every, last))] == [True, True]
