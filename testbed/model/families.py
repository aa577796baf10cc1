"""Facts about model families, as a table, so that no code branches on a model's name.

Prompt templates: LLaVA-1.5's conversation form, BLIP-2's question form (as in the MMEdit protocol), plain completion
for base language models. A family that is not listed gets `DEFAULT`, and the run says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """What differs between model families."""

    name: str
    text: str = "{prompt}"
    """Template of a prompt without a picture."""
    image: str | None = None
    """Template of a prompt with a picture; None for text-only models."""
    answer: str = " {answer}"
    """How the answer follows the prompt."""
    needs_picture: bool = False
    """The forward needs pixels even if no row has a picture: it is given a blank one that no position reads."""
    prompt_tensors: tuple[str, ...] = ()
    """What the processor makes of the prompt for the picture's encoder: a picture's features then belong to one prompt alone."""
    closing: str = ""
    """What the processor itself puts behind a prompt with a picture; it stands at the end of `image` and is not given to the processor."""
    prefix: bool = False
    """The positions of a prompt see each other, those behind it what came before: `token_type_ids` of 0 and 1 tell the forward."""


_CHAT_IMAGE = "USER: <image>\n{prompt} ASSISTANT:"
_CHAT_TEXT = "USER: {prompt} ASSISTANT:"
_QUESTION = "Question: {prompt} Short answer:"
_QWEN = "<|im_start|>user\n{body}{{prompt}}<|im_end|>\n<|im_start|>assistant\n"
_QWEN_IMAGE = _QWEN.format(body="<|vision_start|><|image_pad|><|vision_end|>")
_GEMMA = "<start_of_turn>user\n{body}{{prompt}}<end_of_turn>\n<start_of_turn>model\n"

DEFAULT = Family("default")
FAMILIES: dict[str, Family] = {
    "llava": Family("llava", text=_CHAT_TEXT, image=_CHAT_IMAGE),
    "blip-2": Family("blip-2", text=_QUESTION, image=_QUESTION, needs_picture=True),
    "qwen2_vl": Family("qwen2_vl", text=_QWEN.format(body=""), image=_QWEN_IMAGE, answer="{answer}"),
    "qwen2_5_vl": Family("qwen2_5_vl", text=_QWEN.format(body=""), image=_QWEN_IMAGE, answer="{answer}"),
    "idefics2": Family(
        "idefics2",
        text="User: {prompt}<end_of_utterance>\nAssistant:",
        image="User:<image> {prompt}<end_of_utterance>\nAssistant:",
    ),
    "idefics3": Family("idefics3", text="User:{prompt}\nAssistant:", image="User:<image>{prompt}\nAssistant:"),
    "llava_next": Family("llava_next", text=_CHAT_TEXT, image=_CHAT_IMAGE),
    "llava_onevision": Family("llava_onevision", text=_QWEN.format(body=""), image=_QWEN.format(body="<image>\n"), answer="{answer}"),
    "qwen3_vl": Family("qwen3_vl", text=_QWEN.format(body=""), image=_QWEN_IMAGE, answer="{answer}"),
    "internvl": Family("internvl", text=_QWEN.format(body=""), image=_QWEN.format(body="<IMG_CONTEXT>\n"), answer="{answer}"),
    "gemma3": Family("gemma3", text=_GEMMA.format(body=""), image=_GEMMA.format(body="<start_of_image>"), answer="{answer}"),
    "instructblip": Family(
        "instructblip",
        text=_QUESTION,
        image=_QUESTION,
        needs_picture=True,
        prompt_tensors=("qformer_input_ids", "qformer_attention_mask"),
    ),
    "paligemma": Family(
        "paligemma",
        text="<bos>answer en {prompt}\n",
        image="<image>answer en {prompt}\n",
        answer="{answer}",
        closing="\n",
        prefix=True,
    ),
    "smolvlm": Family("smolvlm", text="User:{prompt}\nAssistant:", image="User:<image>{prompt}\nAssistant:"),
    **{name: Family(name) for name in ("gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3")},
}

DOWN_PROJECTIONS = (
    "mlp.down_proj",
    "fc2",
    "mlp.fc2",
    "mlp.c_proj",
    "mlp.fc_out",
    "mlp.dense_4h_to_h",
    "feed_forward.down_proj",
    "ffn.down_proj",
    "mlp.shared_expert.down_proj",
    "mlp.shared_experts.down_proj",
    "feed_forward.shared_expert.down_proj",
)
"""Where the second matrix of a decoder layer's MLP lies, tried in this order; of a mixture of experts it is that of the shared one,
which every token passes."""

BESIDE_EXPERTS = ("self_attn.o_proj",)
"""The matrix that is edited in a layer whose MLP is a mixture of routed experts alone: the attention's output projection, because
it is the last one before the experts that every token passes."""

ATTENTIONS = ("self_attn", "attn", "attention")
"""Where a decoder layer's attention lies, tried in this order."""

FINAL_NORMS = ("norm", "norm_f", "final_layer_norm", "final_layernorm", "ln_f")
"""Names of the normalisation after the last decoder layer, beside the list of layers."""

LOGIT_FACTORS = {"logit_scale": 1, "logits_scaling": -1}
"""Configuration fields by which logits are multiplied (power 1, Cohere) or divided (power -1, Granite) behind the head."""
LOGIT_CAP = "final_logit_softcapping"
"""The field with c of `c tanh(logits / c)` behind the head (Gemma 2)."""

_NOT_DECODER = ("vision", "visual", "qformer", "audio", "encoder")


@dataclass(frozen=True)
class LogitForm:
    """What a model does to its logits behind the head: `c tanh(factor x / c)`, without a cap `factor x`."""

    factor: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Logits of any shape from what the head gives."""
        logits = logits if self.factor == 1.0 else logits * self.factor
        return logits if self.cap is None else (logits / self.cap).tanh() * self.cap


def logit_form(config: Any) -> LogitForm:
    """The form that a transformers config names, on its own or in its text part."""
    text = config.get_text_config()
    named = ((getattr(text, name, None), power) for name, power in LOGIT_FACTORS.items())
    factors = [float(value) ** power for value, power in named if isinstance(value, int | float)]
    return LogitForm(prod(factors), getattr(text, LOGIT_CAP, None))


class UnknownLayout(ValueError):
    """A model whose decoder layers, down-projection or final norm cannot be found; names what there is."""


def family_of(config: Any) -> Family:
    """The table's row for a transformers config (by `model_type`), or `DEFAULT`."""
    return FAMILIES.get(config.model_type, DEFAULT)


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the language model's decoder layers, found by walking the modules.

    Paths moved between transformers versions and `get_decoder` means different things in them, so neither
    is relied on. Raises `UnknownLayout` unless exactly one list fits.
    """
    config: Any = model.config
    n = getattr(config.get_text_config(), "num_hidden_layers", None)
    found = [
        (path, m)
        for path, m in model.named_modules()
        if isinstance(m, nn.ModuleList)
        and path.rsplit(".", 1)[-1] in ("layers", "h", "blocks")
        and len(m) == n
        and not any(part in path.lower() for part in _NOT_DECODER)
    ]
    if len(found) != 1:
        lists = [f"{p} ({len(m)})" for p, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        raise UnknownLayout(f"{type(model).__name__}: {len(found)} lists of {n} decoder layers found, need one. Lists: {', '.join(lists)}")
    return found[0]


def down_projection(layer: nn.Module) -> tuple[str, nn.Module]:
    """Path within the layer and module of the matrix that editors change. Raises `UnknownLayout`.

    It is the MLP's second one where every token passes the same, else (`is_routed`) the attention's output projection.
    """
    return _first_of(layer, BESIDE_EXPERTS if is_routed(layer) else DOWN_PROJECTIONS, "down-projection")


def is_routed(layer: nn.Module) -> bool:
    """Whether the layer's MLP is a mixture of routed experts alone, so that no one matrix is passed by every token."""
    experts = any(path.rpartition(".")[2] == "experts" for path, _ in layer.named_modules())
    return experts and not any(_has(layer, path) for path in DOWN_PROJECTIONS)


def expert_notes(layers: nn.ModuleList) -> list[str]:
    """A line for each matrix that editors change because a layer's MLP is a mixture of experts."""
    paths: Counter[str] = Counter()
    for layer in layers:
        with suppress(UnknownLayout):
            path = down_projection(layer)[0]
            paths[path] += path in BESIDE_EXPERTS or "expert" in path
    where = f"of {len(layers)} layers have a mixture of experts as their MLP: editors that change its down-projection change"
    return [f"{n} {where} {path} there" for path, n in paths.items() if n]


def _has(owner: nn.Module, path: str) -> bool:
    with suppress(AttributeError):
        return bool(owner.get_submodule(path))
    return False


def attention(layer: nn.Module) -> nn.Module:
    """The attention of a decoder layer. Raises `UnknownLayout`."""
    return _first_of(layer, ATTENTIONS, "attention")[1]


def final_norm(model: nn.Module, layers_path: str) -> nn.Module:
    """The normalisation that follows the last decoder layer. Raises `UnknownLayout`."""
    return _first_of(model.get_submodule(layers_path.rsplit(".", 1)[0]), FINAL_NORMS, "final norm")[1]


def _first_of(owner: nn.Module, paths: Sequence[str], what: str) -> tuple[str, nn.Module]:
    """The first of these paths under which a module has a part, and the part. Raises `UnknownLayout` with what there is."""
    for path in paths:
        with suppress(AttributeError):
            return path, owner.get_submodule(path)
    parts = (path for path, _ in owner.named_modules())
    raise UnknownLayout(f"no {what} in {type(owner).__name__}; it has {', '.join(filter(None, parts))}")
