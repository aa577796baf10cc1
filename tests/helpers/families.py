"""Tiny random models of the families in docs/models.md, from their transformers config classes, beside those of `models`."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer

from testbed.model.handle import ModelHandle
from testbed.model.loading import load
from tests.helpers import models
from tests.helpers.models import IDS, IMAGE, LLAMA, SIDE, VISION, WIDE, tokenizer

_GEMMA: dict[str, Any] = {"head_dim": 16, "query_pre_attn_scalar": 16}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK: dict[str, Any] = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
TEXT: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gptj": {},
    "gpt_neox": {},
    "opt": {},
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gemma": {"head_dim": 16},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "glm4": {"head_dim": 16},
    "exaone4": {},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 4.0},
    "mixtral": _LOCAL,
    "phimoe": _LOCAL,
    "gpt_oss": {**_LOCAL, "head_dim": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 96},
    "qwen3_moe": {**_EXPERTS, "head_dim": 16},
    "deepseek_v2": {**_DEEPSEEK, "q_lora_rank": None},
    "deepseek_v3": {**_DEEPSEEK, "first_k_dense_replace": 0, "q_lora_rank": 16, "n_shared_experts": 3, "routed_scaling_factor": 1.0},
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "head_dim": 16, "num_heads": 8, "n_groups": 1},
}
"""Text families, with what the config of each needs beside that of a Llama."""
ODD: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        "head_dim": 16, "vocab_size_per_layer_input": 400, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "intermediate_size": [96] * 3,
        "activation_sparsity_pattern": [0.0] * 3, "laurel_rank": 8, "altup_num_inputs": 2,
    },
}  # fmt: skip
"""Families that are refused when they are loaded."""
_SIZE = {"height": SIDE, "width": SIDE}
_TILES = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
_FORMER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "cross_attention_frequency": 1}


def _renamed(own: Any, renamed: dict[str, str], **names: str) -> Any:
    """A tokenizer with other texts for some of its special tokens, which processors look up by `names`."""
    text = own.backend_tokenizer.to_str()
    for old, new in renamed.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    ends: Any = {"bos_token": renamed.get("<s>", "<s>"), "eos_token": "</s>", "pad_token": "<pad>"}
    return hf.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), **ends, extra_special_tokens=names)


def llava_next() -> tuple[Any, Any]:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    vision = hf.CLIPVisionConfig(**{**VISION, "num_hidden_layers": 3, "image_size": SIDE, "projection_dim": 32})
    shape: Any = {"image_token_index": 4, "image_grid_pinpoints": _TILES, "tie_word_embeddings": False}
    config = hf.LlavaNextConfig(vision_config=vision, text_config=hf.LlamaConfig(**LLAMA), **shape)
    images = LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=_SIZE, image_grid_pinpoints=_TILES)
    words: Any = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = hf.LlavaNextProcessor(images, tokenizer(image="<image>"), image_token="<image>", **words)
    return hf.LlavaNextForConditionalGeneration(config), processor


def llava_onevision() -> tuple[Any, Any]:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    tiles = [[SIDE, SIDE], *_TILES]
    shape: Any = {"image_token_index": 4, "video_token_index": 6, "image_grid_pinpoints": tiles, "tie_word_embeddings": False}
    vision = hf.SiglipVisionConfig(**{**VISION, "image_size": SIDE})
    config = hf.LlavaOnevisionConfig(vision_config=vision, text_config=hf.Qwen2Config(**LLAMA), **shape)
    images = LlavaOnevisionImageProcessorPil(size=_SIZE, image_grid_pinpoints=tiles)
    words: Any = {
        "num_image_tokens": 16,
        "vision_feature_select_strategy": "full",
        "image_token": "<image>",
        "video_token": "<|video_pad|>",
    }
    own = tokenizer(image="<image>", bos=False)
    processor = hf.LlavaOnevisionProcessor(images, own, hf.LlavaOnevisionVideoProcessor(size=_SIZE), **words)
    return hf.LlavaOnevisionForConditionalGeneration(config), processor


def qwen3_vl() -> tuple[Any, Any]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    text = {**LLAMA, "head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}}
    vision = {
        "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 4, "intermediate_size": 64, "patch_size": 8,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1], **WIDE,
    }  # fmt: skip
    places = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    config = hf.Qwen3VLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **places)
    cut: Any = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    images = Qwen2VLImageProcessorPil(**cut, min_pixels=SIDE * SIDE, max_pixels=4 * SIDE * SIDE)
    processor = hf.Qwen3VLProcessor(images, tokenizer(bos=False, image="<|image_pad|>"), hf.Qwen3VLVideoProcessor(**cut))
    return hf.Qwen3VLForConditionalGeneration(config), processor


def internvl() -> tuple[Any, Any]:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    ends = {"start_image_token": "<|vision_start|>", "end_image_token": "<|vision_end|>"}
    names = {**ends, "context_image_token": "<IMG_CONTEXT>", "video_token": "<|video_pad|>"}
    words = _renamed(tokenizer(bos=False), {"<image>": "<IMG_CONTEXT>"}, **names)
    vision = {**VISION, "image_size": [SIDE, SIDE], "patch_size": [8, 8]}
    shape: Any = {"image_token_id": 4, "image_seq_length": 4, "downsample_ratio": 0.5}
    config = hf.InternVLConfig(vision_config=vision, text_config={"model_type": "qwen2", **LLAMA}, **shape)
    images = GotOcr2ImageProcessorPil(size=_SIZE, crop_to_patches=False)
    processor = hf.InternVLProcessor(images, words, hf.InternVLVideoProcessor(size=_SIZE), image_seq_length=4)
    return hf.InternVLForConditionalGeneration(config), processor


def gemma3() -> tuple[Any, Any]:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    names = {"image_token": "<image>", "boi_token": "<start_of_image>", "eoi_token": "<|vision_end|>"}
    words = _renamed(tokenizer(), {"<|vision_start|>": "<start_of_image>"}, **names)
    text = {**LLAMA, **_GEMMA, "sliding_window": 64}
    places: Any = {"image_token_index": 4, "boi_token_index": 7, "eoi_token_index": 8, "mm_tokens_per_image": 4}
    config = hf.Gemma3Config(vision_config={**VISION, "image_size": SIDE}, text_config=text, tie_word_embeddings=False, **places)
    model = hf.Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zero before training: pictures count for nothing
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)  # ten times narrower before training: all tokens nearly equally likely
    return model, hf.Gemma3Processor(Gemma3ImageProcessorPil(size=_SIZE), words, image_seq_length=4)


def instructblip() -> tuple[Any, Any]:
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    config = hf.InstructBlipConfig(
        vision_config={**VISION, "image_size": SIDE},
        qformer_config={"vocab_size": 400, "pad_token_id": 0, **_FORMER, **WIDE},
        text_config={"model_type": "llama", **LLAMA},
        num_query_tokens=4,
        image_token_index=4,
    )
    model = hf.InstructBlipForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    return model, hf.InstructBlipProcessor(BlipImageProcessorPil(size=_SIZE), tokenizer(), tokenizer(), num_query_tokens=4)


def idefics2() -> tuple[Any, Any]:
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    names = {"image_token": "<image>", "image_boundary_token": "<fake_token_around_image>", "end_of_utterance_token": "<end_of_utterance>"}
    resampler = {"hidden_size": 64, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4, "resampler_head_dim": 16,
                 "num_key_value_heads": 2, **WIDE}  # fmt: skip
    shape: Any = {"image_token_id": 4, "pad_token_id": 0, "tie_word_embeddings": False}
    vision = {**VISION, "image_size": 2 * SIDE}
    config = hf.Idefics2Config(vision_config=vision, perceiver_config=resampler, text_config={"model_type": "mistral", **LLAMA}, **shape)
    images: Any = Idefics2ImageProcessorPil(size={"longest_edge": 2 * SIDE, "shortest_edge": SIDE}, do_image_splitting=False)
    return hf.Idefics2ForConditionalGeneration(config), hf.Idefics2Processor(images, _renamed(tokenizer(), {}, **names), image_seq_len=4)


def paligemma() -> tuple[Any, Any]:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    words = _renamed(tokenizer(bos=False), {"<s>": "<bos>"}, image_token="<image>")
    vision = {"model_type": "siglip_vision_model", **VISION, "image_size": SIDE}
    text = {"model_type": "gemma", **LLAMA, "head_dim": 16}
    config = hf.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=4, projection_dim=64, tie_word_embeddings=False)
    images: Any = SiglipImageProcessorPil(size=_SIZE)
    images.image_seq_length = 16
    return hf.PaliGemmaForConditionalGeneration(config), hf.PaliGemmaProcessor(images, words)


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen3_vl": qwen3_vl,
    "internvl": internvl,
    "gemma3": gemma3,
    "instructblip": instructblip,
    "paligemma": paligemma,
    "idefics2": idefics2,
}
PICTURED = (*IMAGE, *BUILDERS)
"""Families that read pictures."""
KINDS = (*TEXT, *PICTURED)


def save(kind: str, folder: Path) -> None:
    """Write a random model of this kind with its tokenizer or processor, as save_pretrained does."""
    if kind not in BUILDERS:
        models.save(kind, folder, **TEXT.get(kind, ODD.get(kind, {})))
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, processor = BUILDERS[kind]()
    processor.save_pretrained(folder)
    model.generation_config.update(**IDS)
    model.save_pretrained(folder)


@cache
def build(kind: str) -> ModelHandle:
    """A tiny model of this kind, loaded through `testbed.model.loading.load` on the CPU; once a session, so leave it as it is."""
    path = Path(tempfile.mkdtemp(prefix=f"tiny-{kind}-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    save(kind, path)
    return load(str(path), device="cpu")
