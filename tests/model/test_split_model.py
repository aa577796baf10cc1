"""Every editor on a model that accelerate has spread over two devices: states and answers as on one.

The devices are `_two_devices`': tensors that meet on different ones fail, as on GPUs.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streams.base import StreamConfig
from testbed.checks.editors import batch
from testbed.core.events import Ask
from testbed.core.registry import STREAMS
from testbed.model.handle import BadModel, ModelHandle
from testbed.model.loading import load, pick_map, spread
from testbed.monitors.base import MonitorPanel
from testbed.storage.files import read_state, write_state
from tests.helpers.editor_suite import NAMES, STREAM, quick
from tests.helpers.models import build, folder
from tests.helpers.two_devices import CPU, FIRST, SECOND, Placed, machine

PARTS = {
    "llama": {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 1,
              "model.norm": 1, "lm_head": 0},
    "llava": {"model.vision_tower": 1, "model.multi_modal_projector": 1, "model.language_model.embed_tokens": 0,
              "model.language_model.rotary_emb": 0, "model.language_model.layers.0": 0, "model.language_model.layers.1": 1,
              "model.language_model.layers.2": 1, "model.language_model.norm": 1, "lm_head": 1},
}  # fmt: skip
"""Which device each part goes to. The first layer and the last lie apart, and so do a last layer and the head."""
PICTURED = ("balancedit", "elder", "memit", "finetune")
EDITS = {"llama": NAMES, "llava": PICTURED}


@cache
def split(kind: str) -> ModelHandle:
    """A model on two devices; made and used inside `machine()`."""
    from accelerate import dispatch_model

    handle = load(str(folder(kind)), device="cpu")
    places = {part: (FIRST, SECOND)[n] for part, n in PARTS[kind].items()}
    dispatch_model(handle.model, places, force_hooks=True)
    return spread(handle)


def stream_of(kind: str) -> Any:
    return STREAMS.get(STREAM["llava" if kind == "llava" else "gpt2"])(StreamConfig(revert=0, retire=0))


def worked(name: str, kind: str, handle: ModelHandle, place: Path) -> tuple[dict[str, Any], list[Any]]:
    """State and answers after a batch, a save and a load by another editor, and a second batch."""
    stream = stream_of(kind)
    edits = stream.events(8)[4:]
    first, second = quick(name, handle, stream), quick(name, handle, stream)
    assert not first.apply(batch(stream, edits[:2])).failed
    write_state(place, first.state_dict())
    second.load_state_dict(read_state(place))
    report = second.apply(batch(stream, edits[2:], 2))
    assert not report.failed
    if second.traits.weights:
        assert report.delta_norm is not None
    asks = [Ask(e.prompt, e.image, e.target if second.traits.told_truth else None) for e in edits]
    MonitorPanel(handle, [q for q in stream.general() if q.split == "general" and q.image is None][:2], 0).rows(
        2, second.predictor(), second.edited_weights()
    )
    return second.state_dict(), second.predictor().respond(asks, [e.target for e in edits], 3)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in EDITS.items() for name in names])
def test_a_split_model_is_edited_as_a_whole_one(kind: str, name: str, tmp_path: Path) -> None:
    whole, answers = worked(name, kind, build(kind), tmp_path / "step-000001.safetensors")
    with machine():
        state, found = worked(name, kind, split(kind), tmp_path / "step-000002.safetensors")
        state = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    assert state.keys() == whole.keys()
    for k, v in state.items():
        if isinstance(v, torch.Tensor):
            torch.testing.assert_close(v, whole[k], rtol=1e-2, atol=1e-3, equal_nan=True)
    for a, b in zip(found, answers, strict=True):
        assert a.generated == b.generated
        assert a.score is not None and b.score is not None
        np.testing.assert_allclose(a.score.logprobs, b.score.logprobs, atol=1e-2)


def test_tensors_of_two_devices_do_not_mix() -> None:
    with machine():
        a, b = torch.ones(2, 2, device=FIRST), torch.ones(2, 2, device=SECOND)
        assert isinstance(a, Placed) and a.device == FIRST
        for other in (b, torch.ones(2, 2)):
            with pytest.raises(RuntimeError, match="same device"):
                a @ other
        with pytest.raises(RuntimeError, match="same device"):
            a[torch.tensor([0], device=SECOND)]
        with pytest.raises(TypeError, match="numpy"):
            a.numpy()
        assert (a @ b.to(FIRST)).device == FIRST
        assert a.to(CPU).device == CPU


def test_the_parts_lie_where_they_were_put() -> None:
    with machine():
        handle = split("llama")
        assert (handle.device, handle.layer_device(0), handle.layer_device(-1)) == (FIRST, FIRST, SECOND)
        assert handle.hash == build("llama").hash


def test_parts_that_would_be_offloaded_are_refused(tmp_path: Path) -> None:
    parts = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    place = tmp_path / "map.json"
    place.write_text(json.dumps(parts))
    with pytest.raises(BadModel, match="offload"):
        load(str(folder("llama")), device="cpu", device_map=str(place))


def test_a_map_that_fits_on_one_device_is_loaded_and_told() -> None:
    handle = load(str(folder("llama")), device="cpu", device_map="auto")
    assert any("the model lies on" in note for note in handle.notes)
    assert handle.hash == build("llama").hash


@pytest.mark.parametrize(("text", "told"), [("everywhere", "neither auto, balanced"), ("[1]", "must hold parts")])
def test_a_map_that_is_none_is_refused(text: str, told: str, tmp_path: Path) -> None:
    place = tmp_path / "map.json"
    place.write_text(text)
    with pytest.raises(BadModel, match=told):
        pick_map(str(place) if text.startswith("[") else text)
