"""Two devices that a machine without a GPU does not have: tensors that say that they lie there and are computed on the CPU.

A `Placed` tensor holds a CPU tensor and a place. Inside `machine()` whatever is made on, or moved to, such a place
is `Placed`, and an operation over tensors of two places fails as it does on two GPUs: numbers without dimensions
from the CPU and CPU indices are let through, nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CPU = torch.device("cpu")
FIRST, SECOND = torch.device("xla:0"), torch.device("xla:1")
"""Names of a kind of device that nothing here has a driver for, and that torch does not look for when it is named."""
ANYWHERE = torch.device("meta")
"""Where torch's own C++ code puts what it makes beside a `Placed` tensor, which to it is one of `meta`."""
_MOVES = {"_to_copy", "copy_", "set_"}


class Placed(torch.Tensor):
    """A tensor (of `meta` to torch itself) whose numbers are `inner`, on the CPU, and whose device is `place`."""

    inner: torch.Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, inner: torch.Tensor, place: torch.device) -> Placed:
        layout: Any = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made: Any = torch.Tensor._make_wrapper_subclass(cls, inner.size(), **layout, dtype=inner.dtype, device="meta")
        made.inner, made.place = inner, place
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.place} device type tensor to numpy. Use Tensor.cpu() first")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.data.__set__ and isinstance(args[0], Placed):  # type: ignore[attr-defined]
            args[0].inner, args[0].place = args[1].inner, args[1].place
            return None
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """Tensors of Python numbers, which torch makes out of sight of the dispatcher (lists as indices too), and moves, whose
    gradients move back."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            place = kwargs.pop("device")
            return _moved(func(*args, **kwargs), [place])
        if func is torch.Tensor.to:
            return _moved(args[0], [*args[1:], *(v for k, v in kwargs.items() if k in ("device", "dtype", "other"))])
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]), *args[2:])
        if func is torch.Tensor.cpu:
            return _moved(args[0], [CPU])
        return func(*args, **kwargs)


def _moved(x: torch.Tensor, to: Sequence[Any]) -> torch.Tensor:
    """`x.to(...)`: the very tensor where nothing is asked that it is not."""
    for asked in to:
        place, dtype = (asked.device, asked.dtype) if isinstance(asked, torch.Tensor) else (asked, asked)
        if isinstance(place, (str, torch.device)) and torch.device(place) != x.device:
            x = _Move.apply(x, torch.device(place))  # type: ignore[assignment]
        if isinstance(dtype, torch.dtype) and dtype != x.dtype:
            x = x.to(dtype)
    return x


class _Move(torch.autograd.Function):
    """A copy on another device; its gradient goes back to where the tensor lay."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, place: torch.device) -> torch.Tensor:  # type: ignore[override]
        ctx.place = x.device
        return torch.ops.aten._to_copy.default(x, device=place)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return torch.ops.aten._to_copy.default(grad, device=ctx.place), None


@contextmanager
def machine() -> Iterator[None]:
    """Inside, tensors can be made on `FIRST` and `SECOND`, and operations over tensors of two places fail."""
    fused = patch(f"{torch.optim.Optimizer.__module__}._get_fused_kernels_supported_devices", lambda: ["cpu", FIRST.type])
    with fused, _Calls(), _Operations():
        yield


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation of torch: its places compared, done on the CPU, its results placed where its arguments were."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    name, wanted = func.overloadpacket.__name__, kwargs.get("device")
    if name not in _MOVES:
        _same_place(func, name, given)
    inner = {id(x.inner): x for x in given if isinstance(x, Placed)}
    bare_args, bare = tree_map(_inner, args), tree_map(_inner, kwargs)
    made = func(*bare_args, **(bare | {"device": CPU} if wanted is not None else bare))
    places = sorted((x.place for x in given if isinstance(x, Placed)), key=ANYWHERE.__eq__)
    place = torch.device(wanted) if wanted is not None else places[0] if places else CPU
    if name == "copy_":
        return args[0]
    if place == CPU:
        return made
    return tree_map(lambda x: x if not isinstance(x, torch.Tensor) else inner[id(x)] if id(x) in inner else Placed(x, place), made)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, Placed) else x


def _same_place(func: Any, name: str, given: list[torch.Tensor]) -> None:
    """Raise RuntimeError where tensors of two places meet."""
    places = {x.place for x in given if isinstance(x, Placed)} - {ANYWHERE}
    strangers = [tuple(x.shape) for x in given if not isinstance(x, Placed) and x.ndim and not name.startswith(("index", "_index"))]
    if len(places) > 1 or (places and strangers):
        found = [*map(str, sorted(places, key=str)), *(f"cpu {shape}" for shape in strangers)]
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {', '.join(found)} in {func}")
