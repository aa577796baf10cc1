"""The least time that the matrix products of a piece of work can take on this machine, and how far the work is from it.

Every product has two floors: its operations at the rate that the machine gives to large products of that number
format, and the bytes that it must fetch from memory at the rate at which memory can be read. The larger of the two
counts, product by product; what the last-level cache holds, least recently used out first, is fetched for nothing.
Everything that is no product (norms, softmax, the optimiser) has the floor zero.
"""

from __future__ import annotations

import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from testbed.core.timing import running_section

_TRIES, _READ = 5, 2**28
"""Measurements of a rate, of which the best counts; numbers of a vector that is read."""


@dataclass(frozen=True)
class Rates:
    """What a device can do, with the threads in use. cache: bytes of the last level."""

    device: str
    billions_of_operations_per_second: str
    gigabytes_per_second: float
    cache: int


@dataclass
class Machine:
    """Rates of one device, measured when they are first asked for."""

    device: torch.device
    cache: int = field(init=False)
    """Bytes of the last-level cache."""

    def __post_init__(self) -> None:
        self.cache = _cache_of(self.device)
        self._rates: dict[torch.dtype, float] = {}
        self._bandwidth = 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes a second, read in order."""
        if not self._bandwidth:
            x = torch.ones(_READ, device=self.device)
            self._bandwidth = x.nbytes / self._best(x.sum)
        return self._bandwidth

    def rate(self, dtype: torch.dtype) -> float:
        """Operations a second (a multiplication and an addition are two) of a large product of matrices."""
        if dtype not in self._rates:
            n = 2048 if self.device.type == "cpu" else 8192
            a = torch.ones(n, n, device=self.device, dtype=dtype)
            self._rates[dtype] = 2 * n**3 / self._best(lambda: a @ a)
        return self._rates[dtype]

    def rates(self) -> Rates:
        """What has been measured so far, in billions."""
        known = {str(k).removeprefix("torch."): f"{v / 1e9:.0f}" for k, v in self._rates.items()}
        return Rates(str(self.device), ", ".join(f"{k} {v}" for k, v in known.items()), self.bandwidth / 1e9, self.cache)

    def _best(self, work: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(_TRIES + 1):
            start = time.perf_counter()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])


def _cache_of(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) * {"K": 2**10, "M": 2**20}[s[-1]] for s in sizes if s[-1] in "KM"), default=0)


@dataclass
class Work:
    """Operations, bytes from memory, and the floor in seconds of some products."""

    operations: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0


class Products(TorchDispatchMode):
    """Inside, every matrix product is noted, under the stage (`testbed.core.timing`) that is running; "" where none is."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self.stages: defaultdict[str, Work] = defaultdict(Work)
        self._held: OrderedDict[int, int] = OrderedDict()
        self._size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = _COUNTS.get(func._overloadpacket)
        if count is not None:
            self._note(count(*args, **(kwargs or {}), out_val=out), [x for x in tree_leaves((out, args)) if isinstance(x, Tensor)])
        return out

    def _note(self, operations: float, operands: list[Tensor]) -> None:
        """operands: results first."""
        fetched = sum(map(self._fetch, {x.data_ptr(): x for x in operands}.values()))
        work = self.stages[running_section() or ""]
        work.operations += operations
        work.bytes += fetched
        work.seconds += max(operations / self.machine.rate(operands[0].dtype), fetched / self.machine.bandwidth)

    def _fetch(self, x: Tensor) -> int:
        """Bytes of an operand that are not in the cache; afterwards they are, if they fit."""
        place, size = x.data_ptr(), min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
        held = self._held.pop(place, 0)
        self._size -= held
        if size <= self.machine.cache:
            self._held[place] = max(size, held)
            self._size += self._held[place]
        while self._size > self.machine.cache:
            self._size -= self._held.popitem(last=False)[1]
        return size if held < size else 0


@contextmanager
def products(machine: Machine) -> Iterator[defaultdict[str, Work]]:
    """Inside, products are noted by stage."""
    mode = Products(machine)
    with mode:
        yield mode.stages


def _by(count: Callable[..., float]) -> Callable[..., float]:
    return lambda *args, out_val, **kwargs: count(*args, out_val)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> float:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


_aten: Any = torch.ops.aten
_COUNTS: dict[Any, Callable[..., float]] = {
    **flop_registry,
    # what torch's own counter knows not: products in place, vectors, attention on a CPU, factors and their solves
    **{op: _by(lambda c, a, b, *_: 2.0 * a.numel() * b.shape[-1]) for op in (_aten.addmm_, _aten.baddbmm_)},
    _aten.mv: _by(lambda a, *_: 2.0 * a.numel()),
    _aten.addmv: _by(lambda c, a, *_: 2.0 * a.numel()),
    _aten.dot: _by(lambda a, *_: 2.0 * a.numel()),
    _aten._scaled_dot_product_flash_attention_for_cpu: _by(lambda q, k, v, *_: _attention(q, k, v)),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _by(lambda g, q, k, v, *_: 2.5 * _attention(q, k, v)),
    _aten.linalg_cholesky_ex: _by(lambda a, *_: a.numel() * a.shape[-1] / 3),
    _aten.linalg_solve_triangular: _by(lambda a, b, *_: float(a.shape[-1] * b.numel())),
    _aten.cholesky_solve: _by(lambda b, a, *_: 2.0 * a.shape[-1] * b.numel()),
}
"""Operations of each kind of product, by its operands."""
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _COUNTS[torch.ops.mkldnn._linear_pointwise] = _by(lambda x, w, *_: 2.0 * x.numel() * w.shape[0])
