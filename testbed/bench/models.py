"""Models to measure on: loaded ones, and random weights in the shapes of published models, which take the same time and memory.

A shape has the layers, widths and vocabulary of its model. Its tokenizer is the tiny model's, so prompts are a few tokens
longer or shorter than with the model's own.
"""

from __future__ import annotations

from typing import Any

import psutil
import torch

from streams.data import table
from testbed.model import families, loading
from testbed.model.handle import ModelHandle

_HEADROOM = 1.25
"""Free memory that a shape needs, as a multiple of its weights, for activations, the head's logits and an editor's state."""


class ModelTooLarge(RuntimeError):
    """A model that does not fit into memory; the message gives its size and the free memory."""


def _llava_processor(images: dict[str, Any], tokenizer: Any) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words: Any = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(CLIPImageProcessorPil(**images), tokenizer, image_token="<image>", **words)


def _blip2_processor(images: dict[str, Any], tokenizer: Any) -> Any:
    from transformers import AddedToken, Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    processor = Blip2Processor(BlipImageProcessorPil(**images), tokenizer, num_query_tokens=32)
    processor.image_token = AddedToken("<image>", normalized=False, special=True)  # it took the text of the tokenizer's own
    return processor


SHAPES: dict[str, dict[str, Any]] = table(__file__, "shapes.yaml")
_PROCESSORS = {"llava": _llava_processor, "blip-2": _blip2_processor}


def config_of(name: str, like: ModelHandle) -> Any:
    """The transformers config of a shape, with the special tokens of the tiny model's tokenizer."""
    from transformers import AutoConfig

    fields = dict(SHAPES[name]["config"])
    kind = fields.pop("model_type")
    if kind in _PROCESSORS:
        return AutoConfig.for_model(kind, **fields, image_token_index=like.model.config.image_token_index)
    return AutoConfig.for_model(kind, **fields, pad_token_id=like.tokenizer.pad_token_id)


def processor_of(name: str, like: ModelHandle) -> Any:
    """The processor of a shape with images around the tiny model's tokenizer; None for a text model."""
    images = SHAPES[name].get("image_processor")
    return _PROCESSORS[SHAPES[name]["config"]["model_type"]](images, like.tokenizer) if images else None


def parameters(name: str) -> int:
    """The number of parameters of a shape, without allocating them."""
    config = config_of(name, loading.load("tiny", "cpu"))
    with torch.device("meta"):
        return sum(p.numel() for p in _class(name).from_config(config).parameters())


def _class(name: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if "image_processor" in SHAPES[name] else AutoModelForCausalLM


def open_model(name: str, device: str = "auto", dtype: str = "auto") -> ModelHandle:
    """A shape by name, otherwise the model that `loading.load` finds. Raises `ModelTooLarge` for a shape, and `BadModel`."""
    if name not in SHAPES:
        return loading.load(name, device, dtype)
    from transformers.initialization import no_init_weights

    like, where = loading.load("tiny", "cpu"), loading.pick_device(device)
    config, kind = config_of(name, like), loading.pick_dtype(dtype, where)
    size = parameters(name) * kind.itemsize
    free = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else psutil.virtual_memory().available
    if size * _HEADROOM > free:
        raise ModelTooLarge(f"{name} takes {size / 1e9:.1f} GB, and a quarter more to work in; {free / 1e9:.1f} GB are free on {where}")
    with no_init_weights(), where:
        model = _class(name).from_config(config, dtype=kind)
    _fill(model)
    return ModelHandle(model, like.tokenizer, processor_of(name, like), name, families.family_of(config), where)


@torch.no_grad()
def _fill(model: Any) -> None:
    """Fill weights with normal numbers of standard deviation 0.02. One draw of a million numbers is repeated, because drawing
    billions would take longer than the measurement."""
    draw = 0.02 * torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            p.fill_(float(name.endswith("weight")))
            continue
        numbers, flat = draw.to(p), p.view(-1)
        for at in range(0, len(flat), len(numbers)):
            flat[at : at + len(numbers)] = numbers[: len(flat) - at]
