"""ELDER's hyper-parameters by model, in one table; a model that is not in it gets derived ones, and the run says so."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from testbed.model.handle import ModelHandle


@dataclass(frozen=True)
class Hyper:
    """Symbols are those of the paper (arXiv 2408.11869)."""

    modules: str
    """Regular expression over the names of the decoder's linear maps: the mixture layers."""
    rank: int = 8
    """r: rank of one adapter."""
    experts: int = 4
    """N: adapters at each site, more where the planned edits need more codes."""
    active: int = 2
    """k: adapters that a prompt is given at each site."""
    eps: int | None = None
    """Hamming distance to the nearest stored code under which a prompt counts as edited; None is L k (the paper's 12)."""
    guide: float = 0.01
    """lambda: weight of the guided loss."""
    lr: float = 1e-4
    """Adam's step size."""
    steps: int = 50
    """Optimiser steps a batch of edits."""


TABLE: dict[tuple[str, int], Hyper] = {
    ("gpt2", 48): Hyper(r"\.h\.(35|36|37|38|39|40)\.mlp\.c_fc$"),
    ("llama", 32): Hyper(r"\.layers\.(21|22|23|24|25|26)\.mlp\.down_proj$"),
}
"""By type and number of layers of the language model: GPT2-XL and Llama-2-7B."""


def hyper_of(handle: ModelHandle) -> tuple[Hyper, str]:
    """The table's row for this model, or derived values and a sentence that says so (empty for a row of the table)."""
    kind = handle.model.config.get_text_config().model_type
    row = TABLE.get((kind, handle.n_layers))
    return (row, "") if row is not None else derived(handle, kind)


def derived(handle: ModelHandle, kind: str) -> tuple[Hyper, str]:
    """Values for a model nobody tuned: down-projections of up to six layers that end at four fifths of the depth; of a
    shallow model the upper half, with larger steps (chosen on a development stream of the committed model)."""
    depth = handle.n_layers
    stop = depth if depth < 8 else round(0.82 * depth)
    layers = range(max(0, stop - min(6, max(1, depth // 2))), stop)
    names = [handle.down_weight(i).removesuffix(".weight").replace(".", r"\.") for i in layers]
    found = Hyper(f"^({'|'.join(names)})$")
    where = f"down-projections of layers {layers[0]} to {layers[-1]}"
    note = f"no published hyper-parameters for {kind} with {depth} layers: adapters at the {where}"
    return (replace(found, lr=2e-3, guide=1.0, steps=30) if depth < 8 else found), note


def overlaid(h: Hyper, config: Any) -> Hyper:
    """`h` with the fields that the configuration sets (not None) in its place."""
    own = {f.name: getattr(config, f.name) for f in fields(Hyper)}
    return replace(h, **{k: v for k, v in own.items() if v is not None})
