"""Load a model with its tokenizer or processor into a `ModelHandle`.

The committed model `tiny`, a folder and a hub id go through the same transformers code. The handle never changes the
base weights: editors put their own in their place for the length of a forward (`swapped`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Shaped
from safetensors import SafetensorError
from torch import nn

from testbed.model import families
from testbed.model.out_of_memory import MemoryLimit

TINY = Path(__file__).parents[1] / "assets"
PLANS = ("auto", "balanced", "balanced_low_0", "sequential")
"""How accelerate spreads a model over devices by itself."""


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
    cache_folder: Path | None = None
    """Folder for what of the cache is worth keeping from one run to the next."""

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        self.layers_path, self.layers = families.decoder_layers(self.model)
        self.head = self.model.get_output_embeddings()
        self._hash = ""
        self.memory_limit = MemoryLimit()

    @property
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
        """The down-projection of a decoder layer: (.., f) -> (.., d)."""
        return families.down_projection(self.layers[self.layer_index(layer)])[1]

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


def pick_device(name: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises `BadModel` for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise BadModel(f"device {name!r} cannot be used: {str(e).splitlines()[0]}. Try --device cpu or --device auto.") from e
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is float32 on a CPU and bfloat16 on a GPU."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in known:
        raise BadModel(f"dtype {name!r} is not known; there are auto, {', '.join(known)}")
    return known[name]


def pick_map(name: str) -> str | dict[str, Any]:
    """A plan of accelerate's, or the devices of a model's parts by name, from a JSON file. Raises `BadModel` for anything else."""
    if name in PLANS:
        return name
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise BadModel(f"--device-map {name!r} is neither {', '.join(PLANS)} nor a readable JSON file: {e}") from e
    if not isinstance(found, dict):
        raise BadModel(f"--device-map {name} must hold parts of the model and their devices, found {type(found).__name__}")
    return found


def load(name: str, device: str = "auto", dtype: str = "auto", device_map: str | None = None) -> ModelHandle:
    """Load `tiny`, a folder or a hub id.

    device_map: spread the model over devices with accelerate (see `pick_map`); `device` is then where its inputs go.
    Raises `BadModel` for a folder without a model, a hub id that cannot be reached, an unknown device or
    dtype, a model without a tokenizer, and one of which parts would be offloaded.
    """
    place = pick_device(device)
    parts = None if device_map is None else pick_map(device_map)
    source = str(TINY) if name == "tiny" else name
    kind = pick_dtype(dtype, place)
    try:
        return _load(name, source, place, kind, parts)
    except (BadModel, families.UnknownLayout):
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise BadModel(f"model {name!r} cannot be loaded: {reason}. {_advice(source)}") from e


def _load(name: str, source: str, place: torch.device, kind: torch.dtype, parts: str | dict[str, Any] | None) -> ModelHandle:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    config = AutoConfig.from_pretrained(source)
    family = families.family_of(config)
    cls = AutoModelForImageTextToText if family.image is not None else AutoModelForCausalLM
    loaded: Any = cls.from_pretrained(source, dtype=kind, output_loading_info=True, device_map=parts)
    model, info = loaded
    if info["missing_keys"]:
        raise BadModel(f"model {name!r} lacks weights for {', '.join(sorted(info['missing_keys'])[:4])}: transformers would make them up")
    processor = AutoProcessor.from_pretrained(source) if family.image is not None else None
    tokenizer = processor.tokenizer if processor is not None else AutoTokenizer.from_pretrained(source)
    if tokenizer.eos_token_id is None:
        raise BadModel(f"model {name!r} has a tokenizer without an end-of-sequence token, so no answer could end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    notes = []
    if family is families.DEFAULT:
        notes.append(f"model type {config.model_type!r} is not in the families table: the prompt is used as it is")
    if parts is not None:
        return spread(ModelHandle(model, tokenizer, processor, name, family, place, notes))
    return ModelHandle(model.to(place), tokenizer, processor, name, family, place, notes)


def spread(handle: ModelHandle) -> ModelHandle:
    """A handle on a model that accelerate has spread over devices: its inputs go where its embeddings lie.

    Raises `BadModel` where parts are offloaded: their weights are not in memory between forwards, so none could be edited.
    """
    gone = sorted(n for n, p in handle.model.named_parameters() if p.device.type == "meta")
    if gone:
        raise BadModel(
            f"{handle.name} does not fit: {len(gone)} parameters would be offloaded, {gone[0]} first, and what is not in memory "
            "cannot be edited. Use more or larger GPUs, --dtype bfloat16, or a smaller model"
        )
    handle.device = handle.model.get_input_embeddings().weight.device
    used = sorted({str(p.device) for p in handle.model.parameters()})
    handle.notes.append(f"the model lies on {', '.join(used)}; its inputs go to {handle.device}")
    return handle


def _advice(source: str) -> str:
    path = Path(source)
    if path.is_dir():
        there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        return f"The folder holds {there}; it needs config.json, weights and tokenizer files as save_pretrained writes them."
    return "There is no such folder; a hub id needs a network connection or an earlier download. `tiny` always works."


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
