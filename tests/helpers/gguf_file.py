"""Writes a tiny random Llama as a GGUF file, with the tokenizer of the other random models in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants

from tests.helpers.models import text_model, tokenizer

PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, architecture: str = "llama", with_tokenizer: bool = True) -> Any:
    """Write the file, matrices in 8 bits; the transformers model it was made from. Feed-forward width: a multiple of 32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = text_model("llama")
    config, writer = model.config, GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    if with_tokenizer:
        _add_tokenizer(writer, config.vocab_size)
    for name, weight in model.state_dict().items():
        _add_tensor(writer, _name(name), _permuted(name, weight, config).float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_tokenizer(writer: GGUFWriter, size: int) -> None:
    core = json.loads(tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(core["vocab"], key=core["vocab"].__getitem__)
    tokens += [f"<unused{i}>" for i in range(size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t.startswith("<") and t.endswith(">") else 1 for t in tokens])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in core["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(3)


def _name(name: str) -> str:
    """The GGUF name of one of transformers' parameters."""
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}
    if name in fixed:
        return fixed[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{PARTS[rest.removesuffix('.weight')]}.weight"


def _permuted(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """GGUF keeps queries and keys with the halves of each head interleaved."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    n = next((h for part, h in heads.items() if part in name), None)
    return weight if n is None else weight.reshape(n, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _add_tensor(writer: GGUFWriter, name: str, data: np.ndarray) -> None:
    if data.ndim == 1:
        writer.add_tensor(name, data)
        return
    kind = GGMLQuantizationType.Q8_0
    writer.add_tensor(name, quants.quantize(data, kind), raw_dtype=kind)
