"""Linear maps of the frozen model with their weights packed for few rows, for training loops on a CPU.

A training step of one edit multiplies ten to fifty rows with every weight, forward and back. At so few rows a BLAS spends
as much time on the order of the weight in memory as on the product. oneDNN takes weights in its own order, so each is
packed once, for both directions, and kept on the handle. Same products in float32, summed in another order.

Packed in bfloat16, weights and activations of a product are rounded to 8 bits of precision; sums are float32, and so is all
between the products. Processors with AVX-512 BF16 or AMX make these products about twice as fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from testbed.model.handle import ModelHandle

_MOST = 2**31
"""Bytes of packed weights that a handle keeps at most; the other maps stay as they are."""
_LEAST = 100_000
"""Fewest numbers of a weight that is packed: calling a smaller product from Python takes longer than the product."""
_ROWS = 16
"""Rows for which the order is chosen; it serves other numbers as well."""
_OPS = torch.ops.mkldnn
AVAILABLE = torch.backends.mkldnn.is_available() and all(hasattr(_OPS, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
"""Whether this build of torch has oneDNN's products; the reference implementation of the bench does without them."""
QUICK_BFLOAT16 = AVAILABLE and _OPS._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported()
"""Whether this processor multiplies bfloat16 faster than float32; every processor with AMX has AVX-512 BF16 too."""


@dataclass(frozen=True)
class PackedWeight:
    """A weight (d, f) and its transpose in oneDNN's order. source: the weight that was packed."""

    source: Tensor
    forward: Tensor
    backward: Tensor

    @staticmethod
    def of(weight: Tensor, dtype: torch.dtype) -> PackedWeight:
        own = weight.detach()
        packed = (_OPS._reorder_linear_weight(w.to(dtype).contiguous(), _ROWS) for w in (own, own.T))
        return PackedWeight(own, *packed)

    def __call__(self, act: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of activations with one of both orders, in the activations' dtype."""
        own = None if bias is None else bias.to(weight.dtype)
        return _OPS._linear_pointwise(act.to(weight.dtype).contiguous(), weight, own, "none", [], "").to(act.dtype)


class _Product(torch.autograd.Function):
    """(.., f) activations to (.., d), differentiable by the activations alone."""

    @staticmethod
    def forward(ctx: Any, act: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
        ctx.packed = packed
        return packed(act, packed.forward, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.packed(grads[0], ctx.packed.backward), None, None


@contextmanager
def packed_layers(handle: ModelHandle, first: int, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Inside, linear maps of the decoder layers from `first` on run on weights packed in `dtype`, where those can be had.

    A map whose weight is not the one that was packed stays as it is, and so does every map on a GPU, of another dtype, of
    another kind than `nn.Linear`, or with a small weight. Inside the block the weights must not change.
    """
    modules = [m for layer in handle.layers[first:] for m in layer.modules() if type(m) is nn.Linear] if AVAILABLE else []
    with ExitStack() as stack:
        for module in modules:
            packed = _packed(handle, module, dtype)
            if packed is not None:
                module.__dict__["forward"] = lambda act, packed=packed, bias=module.bias: _Product.apply(act, packed, bias)
                stack.callback(module.__dict__.pop, "forward")
        yield


def _packed(handle: ModelHandle, module: nn.Linear, dtype: torch.dtype) -> PackedWeight | None:
    """The packed weight of a map; None where it has none."""
    kept: dict[tuple[nn.Linear, torch.dtype], PackedWeight] = handle.cache.setdefault("packed weights", {})
    weight, name = module.weight, (module, dtype)
    if name in kept:
        return kept[name] if kept[name].source.data_ptr() == weight.data_ptr() else None
    suits = weight.device.type == "cpu" and weight.dtype == torch.float32 and "forward" not in module.__dict__
    size = sum(p.forward.nbytes + p.backward.nbytes for p in kept.values()) + 2 * weight.numel() * dtype.itemsize
    if not suits or weight.requires_grad or weight.numel() < _LEAST or size > _MOST:
        return None
    kept[name] = PackedWeight.of(weight, dtype)
    return kept[name]
