"""Models that cannot be used, each refused with the true reason and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from testbed.model import families
from testbed.model.handle import BadModel, ModelHandle

REMOTE_CODE = "The model needs code that comes with it, and the testbed runs no such code: use a model that transformers itself knows."


def refuse_adapter(name: str, source: str) -> None:
    """Raise `BadModel` for a folder that holds an adapter and no model."""
    folder = Path(source)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        merge = "PeftModel.from_pretrained(base, FOLDER).merge_and_unload().save_pretrained(MERGED)"
        raise BadModel(f"model {name!r} is an adapter, not a model: merge it with its base model ({merge}) and give the merged folder")


def refuse_kind(name: str, config: Any) -> None:
    """Raise `BadModel` for a kind of model that cannot be edited here: quantised, encoder-decoder, image-text of an unknown type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    found = getattr(config, "quantization_config", None)
    if found is not None:
        kind = found.get("quant_method", "unknown") if isinstance(found, dict) else getattr(found, "quant_method", "unknown")
        raise BadModel(
            f"model {name!r} stays quantised after loading ({getattr(kind, 'value', kind)}), and quantised weights cannot be edited: use "
            "the model that it was made from, or a GGUF file, which is dequantised"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise BadModel(
            f"model {name!r} ({config.model_type}) is an encoder-decoder; the testbed edits decoder-only models: use one of these"
        )
    if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and families.family_of(config).image is None:
        known = ", ".join(sorted(n for n, f in families.FAMILIES.items() if f.image))
        raise BadModel(
            f"model {name!r} reads pictures, and its type {config.model_type!r} is not in the table of families, which says how it is "
            f"asked (testbed/model/families.py); there are {known}"
        )


def refuse_weights(handle: ModelHandle) -> None:
    """Raise `BadModel` for weights that are not finite, or a tokenizer with ordinary tokens beyond the embedding."""
    for parameter, weight in handle.model.named_parameters():
        if weight.device.type != "meta" and not torch.isfinite(weight).all():
            raise BadModel(f"model {handle.name!r} holds numbers that are not finite in {parameter}: its file is damaged, get it again")
    rows = handle.model.get_input_embeddings().weight.shape[0]
    special = {*handle.tokenizer.all_special_ids, *getattr(handle.tokenizer, "added_tokens_decoder", {})}
    beyond = [i for i in handle.tokenizer.get_vocab().values() if i >= rows and i not in special]
    if beyond:
        raise BadModel(
            f"the tokenizer of {handle.name!r} has {len(beyond)} tokens beyond the {rows} rows of the model's embedding: they are not of "
            "one model, or the embedding was not resized"
        )
