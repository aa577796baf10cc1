"""Models to measure on: loaded ones, and random weights in the shapes of published models, which take the same time and memory.

A shape has the layers, widths and vocabulary of its model. Its tokenizer is the tiny model's, so prompts are a few tokens
longer or shorter than with the model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from testbed.model import families, loading
from testbed.model.handle import ModelHandle

_HEADROOM = 1.25
"""Free memory that a shape needs, as a multiple of its weights, for activations, the head's logits and an editor's state."""


class ModelTooLarge(RuntimeError):
    """A model that does not fit into memory; the message gives its size and the free memory."""


@dataclass(frozen=True)
class ModelShape:
    """Functions that make the config and, for a model with images, the processor, of the tiny model's handle (for its token ids)."""

    config: Callable[[ModelHandle], Any]
    processor: Callable[[ModelHandle], Any] | None = None


def _gpt2(like: ModelHandle, **size: Any) -> Any:
    from transformers import GPT2Config

    return GPT2Config(pad_token_id=like.tokenizer.pad_token_id, **size)


def _llama3(like: ModelHandle) -> Any:
    from transformers import LlamaConfig

    # the other sizes are the defaults of LlamaConfig
    sizes: Any = {"vocab_size": 128_256, "intermediate_size": 14_336, "num_key_value_heads": 8, "max_position_embeddings": 8192}
    return LlamaConfig(**sizes)


def _llava(like: ModelHandle) -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
    )
    text = LlamaConfig(vocab_size=32_064, max_position_embeddings=4096)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=like.model.config.image_token_index)


def _llava_processor(like: ModelHandle) -> Any:
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    words: Any = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return LlavaProcessor(images, like.tokenizer, image_token="<image>", **words)


def _blip2(like: ModelHandle) -> Any:
    from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig

    text = OPTConfig(
        vocab_size=50_304, hidden_size=2560, ffn_dim=10_240, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=2560
    )
    parts = {"vision_config": Blip2VisionConfig(), "qformer_config": Blip2QFormerConfig(), "text_config": text}
    return Blip2Config(**parts, num_query_tokens=32, image_token_index=like.model.config.image_token_index)


def _blip2_processor(like: ModelHandle) -> Any:
    from transformers import AddedToken, Blip2Processor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    processor = Blip2Processor(BlipImageProcessorPil(size={"height": 224, "width": 224}), like.tokenizer, num_query_tokens=32)
    processor.image_token = AddedToken("<image>", normalized=False, special=True)  # it took the text of the tokenizer's own
    return processor


SHAPES: dict[str, ModelShape] = {
    "random:gpt2-small": ModelShape(_gpt2),
    "random:gpt2-xl": ModelShape(lambda like: _gpt2(like, n_embd=1600, n_layer=48, n_head=25)),
    "random:llama-3-8b": ModelShape(_llama3),
    "random:llava-1.5-7b": ModelShape(_llava, _llava_processor),
    "random:blip-2-opt-2.7b": ModelShape(_blip2, _blip2_processor),
}


def open_model(name: str, device: str = "auto", dtype: str = "auto") -> ModelHandle:
    """A shape by name, otherwise the model that `loading.load` finds. Raises `ModelTooLarge` for a shape, and `BadModel`."""
    return _random(name, device, dtype) if name in SHAPES else loading.load(name, device, dtype)


def parameters(name: str) -> int:
    """The number of parameters of a shape, without allocating them."""
    shape = SHAPES[name]
    config = shape.config(loading.load("tiny", "cpu"))
    with torch.device("meta"):
        return sum(p.numel() for p in _class(shape).from_config(config).parameters())


def _class(shape: ModelShape) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if shape.processor else AutoModelForCausalLM


def _random(name: str, device: str, dtype: str) -> ModelHandle:
    from transformers.initialization import no_init_weights

    shape, like, where = SHAPES[name], loading.load("tiny", "cpu"), loading.pick_device(device)
    config, kind = shape.config(like), loading.pick_dtype(dtype, where)
    size, free = parameters(name) * kind.itemsize, _free(where)
    if size * _HEADROOM > free:
        raise ModelTooLarge(f"{name} takes {size / 1e9:.1f} GB, and a quarter more to work in; {free / 1e9:.1f} GB are free on {where}")
    with no_init_weights(), where:
        model = _class(shape).from_config(config, dtype=kind)
    _fill(model)
    processor = shape.processor(like) if shape.processor else None
    return ModelHandle(model, like.tokenizer, processor, name, families.family_of(config), where)


def _free(device: torch.device) -> int:
    """Free bytes of memory of the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


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
