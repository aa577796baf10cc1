"""Load a model with its tokenizer or processor into a `ModelHandle`.

The committed model `tiny`, an alias, a GGUF file, a folder and a hub id go through the same transformers code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from testbed.core.events import Ask
from testbed.model import families
from testbed.model.encoding import Batch, collate
from testbed.model.handle import BadModel, ModelHandle
from testbed.model.layout import verify_hidden_states
from testbed.model.refusals import REMOTE_CODE, refuse_adapter, refuse_kind, refuse_weights
from testbed.model.sources import ModelSource, find_source

_SHIFT = 3
"""Token positions by which the shorter prompt is moved to the right where it is padded on both sides."""
_PROBE = Ask("The flag of the town is")
_LONGER = Ask("The flag of the town and the flag of the land is")
TINY = Path(__file__).parents[1] / "assets"
PLANS = ("auto", "balanced", "balanced_low_0", "sequential")
"""How accelerate spreads a model over devices by itself."""


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises `BadModel` for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise BadModel(f"device {name!r} cannot be used: {str(e).splitlines()[0]}. Try --device cpu or --device auto.") from e
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is float32 on a CPU and bfloat16 on a GPU."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in known:
        raise BadModel(f"dtype {name!r} is not known; there are auto, {', '.join(known)}")
    return known[name]


def pick_map(name: str) -> str | dict[str, Any]:
    """A plan of accelerate's, or the devices of a model's parts by name, from a JSON file. Raises `BadModel` for anything else."""
    if name in PLANS:
        return name
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise BadModel(f"--device-map {name!r} is neither {', '.join(PLANS)} nor a readable JSON file: {e}") from e
    if not isinstance(found, dict):
        raise BadModel(f"--device-map {name} must hold parts of the model and their devices, found {type(found).__name__}")
    return found


def load(name: str, device: str = "auto", dtype: str = "auto", device_map: str | None = None) -> ModelHandle:
    """Load `tiny`, an alias of aliases.yaml, a GGUF file, a folder or a hub id.

    device_map: spread the model over devices with accelerate (see `pick_map`); `device` is then where its inputs go.
    Raises `BadModel` for a folder without a model, a hub id that cannot be reached, an unknown device or
    dtype, a model without a tokenizer, one of which parts would be offloaded, and one whose answers depend on padding. Raises
    `UnknownLayout` for a model whose decoder layers are not found or give other hidden states than one vector a position.
    """
    place = pick_device(device)
    parts = None if device_map is None else pick_map(device_map)
    kind = pick_dtype(dtype, place)
    source = ModelSource(str(TINY)) if name == "tiny" else find_source(name, kind)
    try:
        handle = _load(name, source.place, place, kind, parts)
        handle.notes += [*([source.note] if source.note else []), *families.expert_notes(handle.layers)]
        refuse_weights(handle)
        verify_hidden_states(handle)
        verify_padding(handle)
        return handle
    except (BadModel, families.UnknownLayout):
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        advice = REMOTE_CODE if "trust_remote_code" in str(e) else _advice(source.place)
        raise BadModel(f"model {name!r} cannot be loaded: {reason}. {advice}") from e


def _load(name: str, source: str, place: torch.device, kind: torch.dtype, parts: str | dict[str, Any] | None) -> ModelHandle:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    refuse_adapter(name, source)
    config = AutoConfig.from_pretrained(source)
    refuse_kind(name, config)
    family = families.family_of(config)
    cls = AutoModelForImageTextToText if family.image is not None else AutoModelForCausalLM
    loaded: Any = cls.from_pretrained(source, dtype=kind, output_loading_info=True, device_map=parts)
    model, info = loaded
    if info["missing_keys"]:
        raise BadModel(f"model {name!r} lacks weights for {', '.join(sorted(info['missing_keys'])[:4])}: transformers would make them up")
    processor = AutoProcessor.from_pretrained(source) if family.image is not None else None
    tokenizer = processor.tokenizer if processor is not None else AutoTokenizer.from_pretrained(source)
    if tokenizer.eos_token_id is None:
        raise BadModel(f"model {name!r} has a tokenizer without an end-of-sequence token, so no answer could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    notes = []
    if tokenizer.pad_token_id >= model.get_input_embeddings().weight.shape[0]:
        beyond = f"the padding token {tokenizer.pad_token!r} lies beyond the model's embedding"
        notes.append(f"{beyond}: {tokenizer.eos_token!r} pads in its place")
        tokenizer.pad_token = tokenizer.eos_token
    if family is families.DEFAULT:
        notes.append(f"model type {config.model_type!r} is not in the families table: the prompt is used as it is")
    if parts is not None:
        return spread(ModelHandle(model, tokenizer, processor, name, family, place, notes))
    return ModelHandle(model.to(place), tokenizer, processor, name, family, place, notes)


def spread(handle: ModelHandle) -> ModelHandle:
    """A handle on a model that accelerate has spread over devices: its inputs go where its embeddings lie.

    Raises `BadModel` where parts are offloaded: their weights are not in memory between forwards, so none could be edited.
    """
    gone = sorted(n for n, p in handle.model.named_parameters() if p.device.type == "meta")
    if gone:
        raise BadModel(
            f"{handle.name} does not fit: {len(gone)} parameters would be offloaded, {gone[0]} first, and what is not in memory "
            "cannot be edited. Use more or larger GPUs, --dtype bfloat16, or a smaller model"
        )
    handle.device = handle.model.get_input_embeddings().weight.device
    used = sorted({str(p.device) for p in handle.model.parameters()})
    handle.notes.append(f"the model lies on {', '.join(used)}; its inputs go to {handle.device}")
    return handle


def _advice(source: str) -> str:
    path = Path(source)
    if path.is_dir():
        there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        return f"The folder holds {there}; it needs config.json, weights and tokenizer files as save_pretrained writes them."
    return "There is no such folder; a hub id needs a network connection or an earlier download. `tiny` always works."


@torch.no_grad()
def verify_padding(handle: ModelHandle) -> None:
    """Compare the log-probabilities at every position of one prompt, alone and padded on the left, the right and both sides.

    Where a model's own layers do not skip padding (recurrent ones, positions that are counted from the row's start), every
    score would depend on which other prompts share the batch, and nothing in the results would show it.

    Raises `BadModel` for a model whose log-probabilities differ by more than rounding.
    """
    lengths = [int(collate(handle, [ask]).prompt.sum()) for ask in (_PROBE, _LONGER)]
    if max(lengths) + _SHIFT > handle.window:
        return  # too short a window for two prompts side by side
    alone = _logprobs(handle, collate(handle, [_PROBE]))
    if not torch.isfinite(alone).all():
        return  # nothing to compare with
    tolerance = 0.02 if handle.dtype in (torch.float32, torch.float64) else 0.5
    both, end = [_PROBE, _LONGER], lengths[0] - 1
    padded = {
        "left": collate(handle, both, side="left"),
        "right": collate(handle, both),
        "both sides": collate(handle, both, at=[end, end + _SHIFT]),
    }
    for side, batch in padded.items():
        apart = float((_logprobs(handle, batch) - alone).abs().max())
        if not apart <= tolerance:
            raise BadModel(
                f"the scores of {handle.name} ({type(handle.model).__name__}) depend on padding: beside a longer prompt, padded on the "
                f"{side}, log-probabilities of a prompt differ by up to {apart:.2g} nats from those of the prompt alone. What else stands "
                "in a batch would change its answers, so it cannot be measured here"
            )


def _logprobs(handle: ModelHandle, batch: Batch) -> torch.Tensor:
    """(P, V) log-probabilities at the P positions of the batch's first prompt."""
    logits = handle.model(**batch.inputs, use_cache=False).logits
    return logits[0][batch.prompt[0]].float().log_softmax(-1)
