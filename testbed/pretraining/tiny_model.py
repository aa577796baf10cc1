"""The parts of the tiny image-text model: tokenizer, processor, and a `LlavaForConditionalGeneration` of 2.6 M parameters.

All of them are plain transformers objects, saved and loaded like any hub model.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from streams.data import table

SETTINGS: dict[str, dict[str, Any]] = table(__file__, "tiny_model.yaml")
PAD, BOS, EOS, IMAGE = "<pad>", "<s>", "</s>", "<image>"
ROLES = ("USER:", " ASSISTANT:")
SIDE: int = SETTINGS["vision"]["image_size"]
"""Side of a picture in pixels."""
IMAGE_TOKENS: int = SETTINGS["model"]["image_seq_length"]
VOCABULARY = 4096


def build_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`. It tokenises any text; frequent names are one token together with their space."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(ROLES),
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.add_tokens([AddedToken(role, normalized=False) for role in ROLES])
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return wrap_tokenizer(core)


def wrap_tokenizer(core: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with the special tokens and the limits of the tiny model."""
    return PreTrainedTokenizerFast(tokenizer_object=core, **SETTINGS["tokenizer"])


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The tokenizer with a PIL image processor (48x48 pixels; a picture takes 36 tokens)."""
    images = CLIPImageProcessorPil(**SETTINGS["image_processor"])
    return LlavaProcessor(image_processor=images, tokenizer=tokenizer, **SETTINGS["processor"])


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """A new fp32 model whose weights depend on `seed` alone; the state of the global generator is restored."""
    special: dict[str, Any] = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    image: Any = tokenizer.convert_tokens_to_ids(IMAGE)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SETTINGS["vision"]),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **SETTINGS["text"], **special),
        image_token_index=image,
        **{**SETTINGS["model"], "pad_token_id": special["pad_token_id"]},
    )
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    return model.float()


def pixels(images: list[np.ndarray]) -> Tensor:
    """uint8 photos (48, 48, 3) as the processor would return them: float32 (n, 3, 48, 48) in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float()
    return (stacked / 255 - 0.5) / 0.5


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write weights (bf16, which halves the file), tokenizer and processor; the config states fp32, so they load as fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items() if k != "lm_head.weight"}  # tied to the embeddings
    config: Any = model.config
    config.dtype = config.text_config.dtype = config.vision_config.dtype = torch.float32
    model.generation_config.max_new_tokens = None
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)


def load(folder: Path) -> tuple[Any, Any]:
    """(model, processor) of a folder, loaded like any hub model. Raises OSError where there is none."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)
