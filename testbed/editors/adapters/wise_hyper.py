"""WISE's hyper-parameters by model, in one table; a model that is not in it gets derived ones, and the run says so."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from testbed.model.handle import ModelHandle


@dataclass(frozen=True)
class Hyper:
    """Symbols are those of the paper (arXiv 2405.14768); margins in units of a layer's output, or relative to it."""

    layer: int
    """Decoder layer whose down-projection is copied."""
    lr: float = 1.0
    """Step size of plain gradient descent."""
    steps: int = 70
    """Optimiser steps a batch, at most."""
    clamp: float = 1.0
    """Largest change of any entry of the matrix."""
    alpha: float = 5.0
    """D of irrelevant prompts is pushed under it."""
    beta: float = 20.0
    """D of edits is pushed over it."""
    gamma: float = 10.0
    """By how much D of an edit must exceed that of an irrelevant prompt."""
    relative: bool = False
    """alpha, beta and gamma are multiples of the mean norm of the layer's output over irrelevant prompts."""


TABLE: dict[tuple[str, int], Hyper] = {
    ("llama", 32): Hyper(27),
    ("mistral", 32): Hyper(27),
    ("gptj", 28): Hyper(21),
}
"""By type and number of layers of the language model: Llama-2-7B (and Llama-3-8B), Mistral-7B, GPT-J-6B."""


def hyper_of(handle: ModelHandle) -> tuple[Hyper, str]:
    """The table's row for this model, or derived values and a sentence that says so (empty for a row of the table)."""
    kind = handle.model.config.get_text_config().model_type
    row = TABLE.get((kind, handle.n_layers))
    return (row, "") if row is not None else derived(kind, handle.n_layers)


def derived(kind: str, depth: int) -> tuple[Hyper, str]:
    """Values for a model nobody tuned: the layer at 27/32 of the depth, margins relative to the layer's output (chosen on a
    development stream of the committed model)."""
    layer = min(depth - 1, round(depth * 27 / 32))
    note = f"no published hyper-parameters for {kind} with {depth} layers: side memory at layer {layer}, margins relative"
    return Hyper(layer, lr=0.3, alpha=0.25, beta=1.0, gamma=0.5, relative=True), note


def overlaid(h: Hyper, config: Any) -> Hyper:
    """`h` with the fields that the configuration sets (not None) in its place."""
    names = [f.name for f in fields(Hyper) if f.name != "relative"]
    own = {n: getattr(config, n) for n in names}
    return replace(h, **{k: v for k, v in own.items() if v is not None})
