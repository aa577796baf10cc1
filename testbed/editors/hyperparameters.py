"""Hyper-parameters of a method by model: published values in a table in the method's own file, derived ones for other models.

A method has one dataclass, its configuration. A field that differs from model to model is None there until the user sets
it; `resolve` fills it in from the model's published row, or else from derived values, and last from the method's defaults.
`doubts` says where the first edits show that the values do not fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from testbed.core.events import EditEvent
from testbed.model.handle import ModelHandle
from testbed.model.predictor import ModelPredictor, Predictor

C = TypeVar("C")
SHALLOW = 8
"""Layers under which a model reads a subject in its first layer and has no room to spread a change; it takes larger steps."""
Values = Mapping[str, Any]


class ModelKey(NamedTuple):
    """What tells a language model from others of its type; models that share a key were published with the same shape."""

    type: str
    """As its configuration names it (`model_type`)."""
    layers: int
    width: int
    """Of the hidden states."""
    vocabulary: int


GPT2_XL = ModelKey("gpt2", 48, 1600, 50257)
GPT_J = ModelKey("gptj", 28, 4096, 50400)
LLAMA_2_7B = ModelKey("llama", 32, 4096, 32000)
LLAMA_3_8B = ModelKey("llama", 32, 4096, 128256)
"""Llama-3.1-8B too."""
LLAMA_32_3B = ModelKey("llama", 28, 3072, 128256)
MISTRAL_7B = ModelKey("mistral", 32, 4096, 32000)
QWEN_25_7B = ModelKey("qwen2", 28, 3584, 152064)
"""Qwen2-7B too."""
# EasyEdit's files for Llama-3.2-1B are in no table: they were copied from a deeper model (its loss layer and WISE's and GRACE's
# layer are 27, FT's is 21, and the model has 16)


@dataclass(frozen=True)
class PublishedRow:
    """A method's published values for one model, where they differ from its defaults, and the file or paper that holds them."""

    source: str
    values: Values


Table = Mapping[ModelKey, PublishedRow]


def model_key(handle: ModelHandle) -> ModelKey:
    """The key under which a model's published row stands."""
    text = handle.model.config.get_text_config()
    return ModelKey(text.model_type, handle.n_layers, handle.width, text.vocab_size)


def resolve(config: C, key: ModelKey, table: Table, derived: Values, defaults: Values) -> tuple[C, str]:
    """The configuration with its None fields filled in, and a sentence that says where its values come from.

    The sentence ends up on screen and in the run's manifest, so that no reader takes derived values for published ones.
    """
    if key in table:
        return filled(config, {**defaults, **table[key].values}), f"published values ({table[key].source})"
    taken = {k: v for k, v in derived.items() if k in _unset(config)}
    known = f"no published values for a {key.type} of {key.layers} layers, width {key.width}, {key.vocabulary:,} tokens"
    what = "derived for it: " + ", ".join(f"{k} {_shown(v)}" for k, v in taken.items()) if taken else "the method's defaults stand"
    return filled(config, {**defaults, **derived}), f"{known}; {what}"


def filled(config: C, values: Values) -> C:
    """A dataclass with these values in the place of fields that are None."""
    return replace(config, **{k: values[k] for k in _unset(config) if k in values})  # type: ignore[type-var]


def _unset(config: Any) -> list[str]:
    return [f.name for f in fields(config) if getattr(config, f.name) is None]


def _shown(value: Any) -> str:
    text = "-".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


_LONGEST = 60
"""Characters of a value that a note shows."""
_UNMOVED, _TENFOLD = 0.1, 10.0
"""Nats a token by which some target must become likelier, and the factor of perplexity from which an editor is doubted."""
PLAIN = (
    "The capital of France is Paris, and the river Seine runs through the city.",
    "Water boils at one hundred degrees and freezes at zero.",
    "She closed the door behind her and walked slowly down the stairs.",
    "The committee will meet again next week to discuss the new budget.",
)
"""Running text by which a jump of perplexity is noticed where the stream has none."""


def doubts(handle: ModelHandle, edited: Predictor, events: Sequence[EditEvent], texts: Sequence[str], informed: bool = False) -> list[str]:
    """Sentences for edits that made no target likelier and for a model whose perplexity on plain text rose tenfold; none where all is well.

    Four sentences or the stream's own texts are read, so a rise is noticed and not measured.
    informed: whether the editor's `Traits` declare `told_truth`, so that it is told what each question is about.
    """
    base, targets = ModelPredictor(handle), [e.target for e in events]
    asks = [replace(e.ask(), truth=e.target, event_id=e.id) if informed else e.ask() for e in events]
    gains = [float(new.logprobs.mean() - old.logprobs.mean()) for new, old in zip(edited.score(asks, targets), base.score(asks, targets))]
    found = []
    if not max(gains) >= _UNMOVED:
        found.append(
            f"the first {len(events)} edits change nothing: their answers became likelier by at most {max(gains):.2g} nats a token"
        )
    before, after = (float(np.concatenate(p.text_logprobs(texts)).mean()) for p in (base, edited))
    if not before - after < np.log(_TENFOLD):
        found.append(f"perplexity of plain text rose from {np.exp(-before):.3g} to {np.exp(-after):.3g} with the first {len(events)} edits")
    return found
