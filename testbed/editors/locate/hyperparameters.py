"""Hyper-parameters of the locate-then-edit methods by model, in one table; a model that is not in it gets derived ones.

Values are those of the released configurations of MEMIT, AlphaEdit, BLUE, PMET and EMMET. They do not carry
over between models: lambda and L2 are read against the size of the keys (a lone edit writes `s / (lambda + s)`
of its residual, `s = k^T C^-1 k`, or `|k|^2 / (L2 + |k|^2)`), so the derived ones are multiples of it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from testbed.editors.base import BadEditor
from testbed.model.handle import ModelHandle


@dataclass(frozen=True)
class Hyper:
    """Everything a locate-then-edit method is tuned by. Symbols are those of the papers."""

    layers: tuple[int, ...]
    """Critical layers, in order; the last is where the target is looked for."""
    layer: int
    """The one layer of ROME and EMMET."""
    steps: int = 25
    """v_num_grad_steps: evaluations of the target's loss (one fewer optimiser steps)."""
    lr: float = 0.5
    """v_lr: Adam's step size of the target."""
    decay: float = 0.5
    """v_weight_decay, on ||delta|| / ||h_0||^2."""
    clamp: float = 0.75
    """clamp_norm_factor: longest delta, as a multiple of ||h_0||."""
    clamp_rome: float = 4.0
    """clamp_norm_factor of ROME, a multiple of the norm of the MLP's output."""
    clamp_pmet: float = 0.75
    """clamp_norm_factor of PMET, for each of its two changes."""
    kl: float = 0.0625
    """kl_factor: weight of the drift of "{subject} is a"."""
    stop: float = 0.05
    """Loss (nats) under which a target counts as found."""
    lam: float = 15_000.0
    """lambda of MEMIT (mom2_update_weight), a multiple of C."""
    lam_pmet: float = 15_000.0
    """lambda of PMET."""
    lam_emmet: float = 0.1
    """lambda_e w of EMMET."""
    l2: float = 10.0
    """L2 of AlphaEdit."""
    l2_blue: float = 10.0
    """L2 of AlphaEdit with BLUE."""
    lam_blue: float = 15_000.0
    """lambda of MEMIT with BLUE."""
    threshold: float = 2e-2
    """nullspace_threshold of AlphaEdit: directions of C with a larger eigenvalue are excluded."""
    contexts: int = 5
    """Sampled sentences before the prompt, beside the bare prompt."""
    relative: bool = False
    """lambda is a multiple of the key width, L2 and the threshold are multiples of the mean eigenvalue of C."""


TABLE: dict[tuple[str, int], Hyper] = {
    ("gpt2", 48): Hyper(
        (13, 14, 15, 16, 17), 17, steps=20, clamp_pmet=2.0, lam=20_000, lam_pmet=10_000, lam_emmet=100, l2_blue=80, lam_blue=20_000
    ),
    ("gptj", 28): Hyper((3, 4, 5, 6, 7, 8), 5, lam_emmet=0.1, l2_blue=95),
    ("llama", 32): Hyper((4, 5, 6, 7, 8), 5, lr=0.1, l2_blue=1),
    ("qwen2", 28): Hyper((4, 5, 6, 7, 8), 5, clamp=4.0, decay=1e-3, l2=1.0, l2_blue=1.0),
}
"""By type and number of layers of the language model: GPT2-XL, GPT-J-6B, Llama-3-8B (and Llama-2-7B), Qwen2.5-7B."""


def hyper_of(handle: ModelHandle) -> tuple[Hyper, str]:
    """The table's row for this model, or derived values and a sentence that says so (empty for a row of the table)."""
    kind = handle.model.config.get_text_config().model_type
    row = TABLE.get((kind, handle.n_layers))
    return (row, "") if row is not None else derived(kind, handle.n_layers)


SHALLOW = 8
"""Layers under which a model reads a subject in its first layer and has no room to spread a change."""


def derived(kind: str, depth: int) -> tuple[Hyper, str]:
    """Values for a model nobody tuned: layers up to a quarter of the depth, weights relative to its keys.

    The published lambda is 1 to 3 times the key width in GPT2-XL, GPT-J and Llama-3; here it is twice. Shallow models,
    the committed one among them, are edited in their first layer, without sampled contexts and with a wider clamp. Both
    were chosen on a development stream of the tiny model.
    Raises `BadEditor` for a model of one layer, where nothing lies above the change.
    """
    if depth < 2:
        raise BadEditor("locate-then-edit methods need a decoder layer above the one they change; this model has a single layer")
    last = 0 if depth < SHALLOW else round(depth * 0.28)
    layers = tuple(range(max(0, last - 4, round(depth * 0.12)), last + 1)) if last else (0,)
    lam = dict.fromkeys(("lam", "lam_pmet", "lam_emmet", "lam_blue"), 2.0)
    weights: dict[str, Any] = {**lam, "l2": 0.1, "l2_blue": 0.1, "threshold": 1.0}
    plain = Hyper(layers, layers[len(layers) // 2], relative=True, **weights)
    found = replace(plain, steps=30, lr=0.5, clamp=10.0, clamp_rome=20.0, contexts=0) if depth < SHALLOW else plain
    shown = ", ".join(map(str, layers))
    return found, f"no published hyper-parameters for {kind} with {depth} layers: layers {shown}, weights relative to its keys"


def overlaid(h: Hyper, config: Any) -> Hyper:
    """`h` with the fields that the configuration sets (not None) in its place."""
    names = {f.name for f in fields(Hyper)}
    own = {f.name: getattr(config, f.name) for f in fields(config) if f.name in names}
    return replace(h, **{k: v for k, v in own.items() if v is not None})
