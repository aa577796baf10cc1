"""A model with its tokenizer or processor, as everything else sees it.

The handle never changes the base weights: editors put their own in their place for the length of a forward (`swapped`).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import nn

from testbed.model import families
from testbed.model.out_of_memory import MemoryLimit


class BadModel(ValueError):
    """A model, device or dtype that cannot be used; the message says what was asked for, what there is and what to do."""


@dataclass
class ModelHandle:
    """A frozen model with its tokenizer or processor, family and device.

    Shapes used throughout: B rows, T positions, d model width, f width of the MLP, V vocabulary.
    """

    model: Any
    tokenizer: Any
    processor: Any | None
    name: str
    family: families.Family
    device: torch.device
    """Where the model takes its inputs."""
    notes: list[str] = field(default_factory=list)
    cache: dict[str, Any] = field(default_factory=dict)
    """What cannot change while the base weights do not (tokenised prompts, picture features)."""
    examples: Mapping[str, str] = field(default_factory=dict)
    """By relation the solved examples that stand in the place of {examples} in a prompt template."""
    cache_folder: Path | None = None
    """Folder for what of the cache is worth keeping from one run to the next."""
    data_root: Path | None = None
    """Folder of data files, where general text is looked for."""

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        self.layers_path, self.layers = families.decoder_layers(self.model)
        self.head = self.model.get_output_embeddings()
        self.logit_form = families.logit_form(self.model.config)
        self._hash = ""
        self.memory_limit = MemoryLimit()

    @cached_property
    def norm(self) -> nn.Module:
        """The normalisation after the last decoder layer. Raises `UnknownLayout` where there is none."""
        return families.final_norm(self.model, self.layers_path)

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def width(self) -> int:
        return self.model.config.get_text_config().hidden_size

    @property
    def reads_pictures(self) -> bool:
        return self.family.image is not None and self.processor is not None

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @cached_property
    def takes_position_ids(self) -> bool:
        """Whether position ids counted from each row's first token may be given to the forward.

        A model whose rotary embedding numbers the rows and columns of a picture apart counts its positions itself.
        """
        text = self.model.config.get_text_config()
        scaling = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
        takes = "position_ids" in inspect.signature(self.model.forward).parameters
        return takes and "mrope_section" not in scaling

    @cached_property
    def appends_end(self) -> bool:
        """Whether the tokenizer appends its end token to every text."""
        return self.tokenizer("a")["input_ids"][-1:] == [self.tokenizer.eos_token_id]

    @property
    def window(self) -> int:
        """Longest sequence of the model, in tokens."""
        return int(getattr(self.model.config.get_text_config(), "max_position_embeddings", 0) or 2048)

    def layer_index(self, layer: int) -> int:
        """A layer counted from the front, or from the back when negative. Raises `BadModel` out of range."""
        if not -self.n_layers <= layer < self.n_layers:
            raise BadModel(f"layer {layer} does not exist: {self.name} has layers 0 to {self.n_layers - 1} (or -1 to -{self.n_layers})")
        return layer % self.n_layers

    def down(self, layer: int) -> nn.Module:
        """The matrix of a decoder layer that editors change, its down-projection wherever it has one: (.., f) -> (.., d)."""
        return families.down_projection(self.layers[self.layer_index(layer)])[1]

    def logits(self, hidden: Float[torch.Tensor, "*rows d"]) -> Float[torch.Tensor, "*rows V"]:
        """(.., V) logits of final hidden states (.., d), after the last norm, beside the model's inputs."""
        return self.logit_form(self.head(hidden).to(self.device))

    def is_routed(self, layer: int) -> bool:
        """Whether the layer's MLP is a mixture of routed experts alone; `down` is then the attention's output projection."""
        return families.is_routed(self.layers[self.layer_index(layer)])

    def attention(self, layer: int) -> nn.Module:
        """The attention of a decoder layer: (.., d), or a tuple that begins with it."""
        return families.attention(self.layers[self.layer_index(layer)])

    def down_weight(self, layer: int) -> str:
        """Name of that matrix among the model's parameters."""
        i = self.layer_index(layer)
        return f"{self.layers_path}.{i}.{families.down_projection(self.layers[i])[0]}.weight"

    def layer_device(self, layer: int) -> torch.device:
        """Device of a layer's down-projection; of a model that is split over devices, not always that of its inputs."""
        return self.parameter(self.down_weight(layer)).device

    def parameter(self, name: str) -> nn.Parameter:
        return self.model.get_parameter(name)

    @property
    def hash(self) -> str:
        """SHA-256 over names, dtypes and bytes of all parameters and buffers (16 hex digits), computed once."""
        self._hash = self._hash or weights_hash(self.model)
        return self._hash

    @contextmanager
    def swapped(self, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Run the model with these parameters (name -> tensor of the same shape) in place of its own."""
        kept: list[tuple[nn.Parameter, torch.Tensor]] = []
        try:
            for name, new in weights.items():
                p = self.parameter(name)
                if new.shape != p.shape:
                    raise BadModel(f"{name} has shape {tuple(p.shape)}, the edited weight {tuple(new.shape)}")
                kept.append((p, p.data))
                p.data = new.detach().to(device=p.device, dtype=p.dtype)
            yield
        finally:
            for p, old in kept:
                p.data = old

    @contextmanager
    def hooked(self, module: nn.Module, hook: Callable[..., Any], pre: bool = False) -> Iterator[None]:
        """Run with a forward hook (or, with `pre`, a forward pre-hook) on one module."""
        handle = module.register_forward_pre_hook(hook) if pre else module.register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def weights_hash(model: nn.Module) -> str:
    """Hash of all parameters and buffers: names, dtypes, shapes and bytes (16 hex digits)."""
    h = hashlib.sha256()
    for name, t in sorted(model.state_dict().items()):
        h.update(f"{name}|{t.dtype}|{tuple(t.shape)}".encode())
        h.update(t.detach().reshape(-1).cpu().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]


def stores_transposed(module: nn.Module) -> bool:
    """Whether a linear map keeps its weight as (f, d), as GPT-2's `Conv1D` does, and not as (d, f), as `nn.Linear` does."""
    return not isinstance(module, nn.Linear)


def as_matrix(module: nn.Module, weight: Shaped[torch.Tensor, "a b"]) -> Shaped[torch.Tensor, "d f"]:
    """A weight (or a change of one) as the module stores it, as a view (d, f)."""
    return weight.mT if stores_transposed(module) else weight


def as_stored(module: nn.Module, matrix: Shaped[torch.Tensor, "d f"]) -> Shaped[torch.Tensor, "a b"]:
    """A matrix (d, f) in the order in which the module stores its weight, contiguous."""
    return matrix.mT.contiguous() if stores_transposed(module) else matrix


def project(
    module: nn.Module, act: Float[torch.Tensor, "*rows f"], weight: Float[torch.Tensor, "a b"], bias: bool = True
) -> Float[torch.Tensor, "*rows d"]:
    """(.., d) output of a linear map for activations (.., f) under another weight, given as the module stores its own.

    The weight's dtype decides the arithmetic; the result has the activations'. bias: add the module's own bias.
    """
    own: Any = module.bias if bias else None
    out = act.to(weight.dtype) @ as_matrix(module, weight).mT
    return (out + own.to(weight.dtype) if own is not None else out).to(act.dtype)
