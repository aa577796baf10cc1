"""Tiny random models of the real transformers classes, saved to a folder and loaded as a user's are.

Weights are wide (`initializer_range` 0.2), so that two random models answer differently. The tokenizer and the processor are
made by hand; nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

_PLACES = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
_MARKS = ("<|im_start|>", "<|im_end|>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
_SPECIAL = (*_PLACES, *_MARKS, *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)))
_CORPUS = (
    "USER: what colour is the ship? ASSISTANT: green",
    "Question: who leads the northern harbour? Short answer: Mara Venn",
    "the small lamp stands beside the river and the old bridge",
    "a red circle, a blue square, two yellow stars, three towers",
)
SIDE = 32


def tokenizer(pad: bool = True, bos: bool = True, image: str | None = None) -> Any:
    """Byte-level BPE; without `pad` it has no padding token, without `bos` it puts none before a text (as GPT-2's)."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        _CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=list(_SPECIAL), initial_alphabet=alphabet, show_progress=False)
    )
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>" if pad else None,
        extra_special_tokens={"image_token": image} if image else {},
        clean_up_tokenization_spaces=False,
    )


IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"initializer_range": 0.2}
LLAMA = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, **IDS, **WIDE,
}  # fmt: skip
GPT = {"vocab_size": 400, "n_embd": 64, "n_inner": 96, "n_layer": 3, "n_head": 4, "n_positions": 256, **IDS, **WIDE}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8, **WIDE}


def llava() -> tuple[Any, Any]:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vision = hf.CLIPVisionConfig(**{**VISION, "num_hidden_layers": 3, "image_size": SIDE, "projection_dim": 32})
    config = hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**LLAMA), image_token_index=4, image_seq_length=16, tie_word_embeddings=False
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    words: Any = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return hf.LlavaForConditionalGeneration(config), hf.LlavaProcessor(images, tokenizer(image="<image>"), image_token="<image>", **words)


def gpt2() -> tuple[Any, Any]:
    """A causal language model without a padding token and without a begin token before a text."""
    return hf.GPT2LMHeadModel(hf.GPT2Config(**GPT)), tokenizer(pad=False, bos=False)


BUILDERS = {"llava": llava, "gpt2": gpt2}
"""An image-text model and a text model."""


def save(kind: str, folder: Path, seed: int = 0) -> None:
    """Write a random model of this kind with its tokenizer or processor, as save_pretrained does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = BUILDERS[kind]()
    processor.save_pretrained(folder)
    model.generation_config.update(**IDS)
    model.save_pretrained(folder)
