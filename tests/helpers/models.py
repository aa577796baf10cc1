"""Tiny random models of the real transformers classes, saved to a folder and loaded as a user's are.

An image-text and a text model are those of `testbed check`; here are more kinds. Nothing is downloaded.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf

from testbed.checks.random_models import GPT, IDS, LLAMA, SIDE, VISION, WIDE, llava, tokenizer
from testbed.model.handle import ModelHandle
from testbed.model.loading import load

TEXT = ("gpt2", "gptj", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3")
IMAGE = ("llava", "blip-2", "qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm")
KINDS = TEXT + IMAGE


@dataclass(frozen=True)
class Noise:
    """A picture of coloured noise (satisfies `testbed.core.events.Picture`)."""

    seed: int
    height: int = SIDE
    width: int = SIDE

    @property
    def key(self) -> str:
        return f"noise-{self.seed}-{self.height}x{self.width}"

    def load(self) -> np.ndarray:
        rng = np.random.default_rng(self.seed)
        coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        return np.kron(coarse, np.ones((self.height // 4, self.width // 4, 1), dtype=np.uint8))


OPT = {
    "vocab_size": 400, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "init_std": 0.2,
    "max_position_embeddings": 256, "word_embed_proj_dim": 64, **IDS,
}  # fmt: skip


def text_model(kind: str, **changes: Any) -> Any:
    """A random causal language model of a `model_type`; `changes` go to its config."""
    base = {"gpt2": GPT, "gptj": {**GPT, "rotary_dim": 8}, "opt": OPT}.get(kind, LLAMA)
    rows = {"qwen3": {"head_dim": 16}, "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16}, "gpt_neox": {"rotary_pct": 0.5}}
    config = hf.AutoConfig.for_model(kind, **{**base, **rows.get(kind, {}), **changes})
    return hf.AutoModelForCausalLM.from_config(config)


def blip2() -> tuple[Any, Any]:
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    former = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "cross_attention_frequency": 1}
    config = hf.Blip2Config(
        vision_config=hf.Blip2VisionConfig(**{**VISION, "image_size": SIDE}),
        qformer_config=hf.Blip2QFormerConfig(vocab_size=400, **former, **WIDE),
        text_config=hf.OPTConfig(**OPT),
        num_query_tokens=4,
        image_token_index=4,
    )
    model = hf.Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    images = BlipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    return model, hf.Blip2Processor(images, tokenizer(), num_query_tokens=4)


def qwen_vl(kind: str) -> tuple[Any, Any]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    old: Any = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "initializer_range": 0.2}
    new: Any = {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 4, "intermediate_size": 64, "window_size": 32,
                "fullatt_block_indexes": [1], "initializer_range": 0.2}  # fmt: skip
    text = {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
    vision = {**(old if kind == "qwen2_vl" else new), "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    places = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    config = hf.AutoConfig.for_model(kind, vision_config=vision, text_config=text, tie_word_embeddings=False, **places)
    images = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=SIDE * SIDE, max_pixels=4 * SIDE * SIDE)
    tok = tokenizer(bos=False, image="<|image_pad|>")
    video = hf.Qwen2VLVideoProcessor(patch_size=8, merge_size=2, temporal_patch_size=2)
    cls = hf.Qwen2VLProcessor if kind == "qwen2_vl" else hf.Qwen2_5_VLProcessor
    return hf.AutoModelForImageTextToText.from_config(config), cls(images, tok, video)


def idefics(kind: str) -> tuple[Any, Any]:
    """Both kinds with `Idefics3Processor`, as SmolVLM-256M ships it (`SmolVLMProcessor` needs one more package)."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    vision = {**VISION, "image_size": SIDE}
    text = {"model_type": "llama", **LLAMA}
    places = {"scale_factor": 2, "image_token_id": 4, "pad_token_id": 0, "tie_word_embeddings": False}
    config = hf.AutoConfig.for_model(kind, vision_config=vision, text_config=text, **places)
    images = Idefics3ImageProcessorPil(size={"longest_edge": 2 * SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=True)
    return hf.AutoModelForImageTextToText.from_config(config), hf.Idefics3Processor(images, tokenizer(image="<image>"), image_seq_len=4)


BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava,
    "blip-2": blip2,
    "qwen2_vl": lambda: qwen_vl("qwen2_vl"),
    "qwen2_5_vl": lambda: qwen_vl("qwen2_5_vl"),
    "idefics3": lambda: idefics("idefics3"),
    "smolvlm": lambda: idefics("smolvlm"),
}


def save(kind: str, folder: Path, seed: int = 0, **changes: Any) -> None:
    """Write a random model of this kind with its tokenizer or processor, as save_pretrained does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind in BUILDERS:
            model, processor = BUILDERS[kind]()
            processor.save_pretrained(folder)
        else:
            model = text_model(kind, **changes)
            tokenizer(pad=kind != "gpt2", bos=kind not in ("gpt2", "qwen2", "qwen3")).save_pretrained(folder)
    model.generation_config.update(**IDS)
    model.save_pretrained(folder)


@cache
def folder(kind: str, seed: int = 0) -> Path:
    """The folder of a saved model of this kind, written once a session."""
    path = Path(tempfile.mkdtemp(prefix=f"tiny-{kind}-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    save(kind, path, seed)
    return path


@cache
def build(kind: str, seed: int = 0) -> ModelHandle:
    """A tiny model of this kind, loaded through `testbed.model.loading.load` on the CPU; once a session, so leave it as it is."""
    return load(str(folder(kind, seed)), device="cpu")
