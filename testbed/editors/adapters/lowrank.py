"""Low-rank additions to linear maps of the decoder: where they go, what they are trained on, how they are merged and saved.

An adapter is U (r, f) and V (r, d), float32, added to a map's output as `scale * V^T U x`: LoRA's A and B with
B transposed (Hu et al. 2021, arXiv 2106.09685), whatever order the model stores its own weight in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from testbed.core.events import Ask
from testbed.core.timing import timed
from testbed.editors.base import BadEditor
from testbed.editors.work import Work
from testbed.model.encoding import Batch, answer_ids, collate
from testbed.model.handle import ModelHandle, as_matrix, as_stored, project, stores_transposed
from testbed.model.layout import verify_layout
from testbed.model.suffix import DownProjectionSuffix, suffix_from_down_projection, suffix_from_layer

Add = Callable[[Tensor], Tensor]
"""What a target adds to its output: (B, T, f) activations to (B, T, d)."""


@dataclass(frozen=True)
class TargetModule:
    """One linear map (.., f) -> (.., d) of decoder layer `layer`."""

    name: str
    module: nn.Module
    layer: int
    f: int
    d: int

    @property
    def weight(self) -> str:
        """Name of its matrix among the model's parameters."""
        return f"{self.name}.weight"


def find_target_modules(handle: ModelHandle, pattern: str) -> list[TargetModule]:
    """The linear maps of the decoder layers whose full name the regular expression finds, in the order in which they run.

    Raises `BadEditor` for a pattern that is none, or that matches nothing (with what there is).
    """
    try:
        wanted = re.compile(pattern)
    except re.error as e:
        raise BadEditor(f"modules={pattern!r} is not a regular expression: {e}") from e
    every = [s for i, layer in enumerate(handle.layers) for s in _linear(f"{handle.layers_path}.{i}", i, layer)]
    found = [s for s in every if wanted.search(s.name)]
    if not found:
        kinds = dict.fromkeys(s.name.removeprefix(f"{handle.layers_path}.{s.layer}.") for s in every)
        raise BadEditor(
            f"modules={pattern!r} matches no linear map of {handle.name}; each of its {handle.n_layers} decoder layers, "
            f"{handle.layers_path}.0 to {handle.layers_path}.{handle.n_layers - 1}, has {', '.join(kinds)}"
        )
    return _as_they_run(handle, found)


def _linear(path: str, layer: int, module: nn.Module) -> list[TargetModule]:
    out = []
    for name, m in module.named_modules():
        weight = getattr(m, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 2 and not isinstance(m, nn.Embedding):
            d, f = as_matrix(m, weight).shape
            out.append(TargetModule(f"{path}.{name}", m, layer, f, d))
    return out


@torch.no_grad()
def _as_they_run(handle: ModelHandle, targets: Sequence[TargetModule]) -> list[TargetModule]:
    """In the order of a forward, which may differ from the order of the modules."""
    ran: list[TargetModule] = []
    with ExitStack() as stack:
        for s in targets:
            stack.enter_context(handle.hooked(s.module, lambda m, args, output, s=s: ran.append(s)))
        handle.model(**collate(handle, [Ask("order")]).inputs, use_cache=False)
    return ran


def check_rank(targets: Sequence[TargetModule], rank: int) -> None:
    """Raise `BadEditor` for a rank that a target is too narrow for."""
    least = min(targets, key=lambda s: min(s.f, s.d))
    if rank > min(least.f, least.d):
        raise BadEditor(f"rank {rank} is more than {least.name} is wide: set rank to {min(least.f, least.d)} or less")


def adapter_work(targets: Sequence[TargetModule], rank: int, steps: int, n_layers: int, adapters: int = 1, rows: float = 1.0) -> Work:
    """The counts of training so many adapters a target on so many rows an edit, in a model of `n_layers` layers."""
    numbers = float(adapters * rank * sum(t.f + t.d for t in targets))
    layers = float(n_layers - targets[0].layer)
    return Work(forwards=rows, steps=float(steps), rows=rows, layers=layers, trained=numbers, state=numbers)


class AdaptedSuffix:
    """A batch of edits and the part of the model from the first target module up, for training what is added there.

    Where that module is a layer's down-projection and no other target stands in the layer, what enters and leaves it is kept,
    and training runs from there; else from the beginning of its layer.

    act: (B, T, f) what enters the first target module, which no addition changes. Raises `UnknownLayout` for a model
    whose logits are not those of its last norm and head.
    """

    @timed("capture")
    def __init__(self, handle: ModelHandle, targets: Sequence[TargetModule], asks: Sequence[Ask], answers: Sequence[str]) -> None:
        self.handle, self.targets, first = handle, targets, targets[0]
        self.lower: DownProjectionSuffix | None = None
        alone = all(t.layer > first.layer for t in targets[1:])
        if alone and first.module is handle.down(first.layer) and first.layer + 1 < handle.n_layers:
            self.lower = suffix_from_down_projection(handle, list(asks), list(answers), first.layer)
            self.suffix, self.batch, self.act = self.lower.upper, self.lower.batch, self.lower.act
            with torch.no_grad():
                self.out = project(first.module, self.act, handle.parameter(first.weight))
            return
        self.batch: Batch = collate(handle, asks, [answer_ids(handle, a, x) for a, x in zip(asks, answers)], end=True)
        self.suffix = suffix_from_layer(handle, self.batch, first.layer)
        self.act = self._entering()
        verify_layout(handle, first.layer, self.batch, self._logits, "adapter")

    @torch.no_grad()
    def _entering(self) -> Tensor:
        kept: list[Tensor] = []
        first = self.targets[0]
        with self.handle.hooked(first.module, lambda m, args: kept.append(args[0].detach()), pre=True):
            self.suffix.run(self.suffix.hidden, stop=first.layer + 1)
        return kept[0].reshape(*self.batch.prompt.shape, -1)

    def _logits(self, weight: Tensor) -> Tensor:
        """(n, V) without any addition, under another weight of the first layer's down-projection."""
        with self.handle.swapped({self.handle.down_weight(self.targets[0].layer): weight}):
            return self.handle.logits(self.final_hidden([]))

    def final_hidden(self, adds: Sequence[Add]) -> Tensor:
        """(n, d) final hidden states where answer tokens are predicted, with an addition at each target module, in order."""
        with ExitStack() as stack:
            for target, add in list(zip(self.targets, adds))[self.lower is not None :]:
                stack.enter_context(self.handle.hooked(target.module, lambda m, args, out, add=add: self._put(add, args[0], out)))
            if self.lower is not None:
                return self.lower.final_hidden(lambda act: self._put(adds[0], act, self.out) if adds else self.out)
            return self.suffix.final_hidden(self.suffix.run(self.suffix.hidden))

    def _put(self, add: Add, act: Tensor, out: Tensor) -> Tensor:
        more = add(act.reshape(*self.batch.prompt.shape, -1))
        return out + more.to(out.dtype).reshape(out.shape)

    def losses(self, adds: Sequence[Add]) -> Tensor:
        """(B,) mean cross-entropy (nats a token) of each row's answer, its end token included."""
        return self.suffix.answer_losses(self.final_hidden(adds))


@dataclass(frozen=True)
class Adapter:
    """u: (r, f), v: (r, d), float32. scale: what the product is multiplied by (LoRA's alpha / r)."""

    u: Tensor
    v: Tensor
    scale: float = 1.0

    def __call__(self, act: Tensor) -> Tensor:
        """(.., d) float32 what it adds for activations (.., f)."""
        return self.scale * (act.float() @ self.u.mT @ self.v)


def fresh(target: TargetModule, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """U uniform in +-1/sqrt(f) as PEFT draws it, V zero: an adapter that changes nothing yet."""
    u = (2 * torch.rand(rank, target.f, generator=generator) - 1) / target.f**0.5
    device = next(target.module.parameters()).device
    return u.to(device), torch.zeros(rank, target.d, device=device)


def delta(target: TargetModule, adapter: Adapter) -> Tensor:
    """The adapter as a change of the target's weight, float32, in the order in which the model stores it."""
    return as_stored(target.module, adapter.scale * (adapter.v.mT @ adapter.u))


def save_peft(folder: Path, handle: ModelHandle, adapters: Mapping[str, Adapter]) -> None:
    """Write one adapter a target (by name of its module) as PEFT reads it: adapter_config.json and adapter_model.safetensors.

    All must have one rank and one scale; raises `BadEditor` where they do not.
    """
    kinds = {(len(a.u), a.scale) for a in adapters.values()}
    if len(kinds) != 1:
        raise BadEditor(f"PEFT keeps one rank and one scale an adapter, got {sorted(kinds)} over {len(adapters)} modules")
    rank, scale = kinds.pop()
    tensors: dict[str, Tensor] = {}
    for name, a in adapters.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.u.cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = a.v.mT.cpu().contiguous()
    stored_transposed = stores_transposed(handle.model.get_submodule(next(iter(adapters))))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "target_modules": sorted(adapters),
        "fan_in_fan_out": stored_transposed,
        "base_model_name_or_path": handle.name,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
