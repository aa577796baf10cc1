"""Cost of a codebook by its number of entries: insertion, retrieval beside the model's forward, bytes. Times are CPU time.

Keys are drawn in clusters of 400, because activations of similar questions lie close together.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streams.base import Stream
from testbed.bench.common import BenchConfig, Rows, questions_about, seconds_of
from testbed.bench.models import open_model
from testbed.editors.codebook.balancedit import LowRankWeights
from testbed.editors.codebook.codebook import Codebook, Entry
from testbed.editors.codebook.memoir import OverlapRouter, packed
from testbed.editors.codebook.nearest import Keys, Metric, Nearest
from testbed.model.encoding import collate
from testbed.model.handle import ModelHandle
from testbed.storage.files import write_state

WIDTH_7B, INNER_7B = 4096, 11008
"""Width and inner width of a 7B Llama."""
RANK = 4
SIZES = (100, 1_000, 10_000, 20_000)
"""Numbers of entries."""
_CLUSTER = 400
CPU = torch.device("cpu")


@dataclass(frozen=True)
class InsertionTime:
    """Milliseconds of one insertion into a codebook, medians of fifty."""

    entries: int
    insert: float
    """Of a ball that overlaps those of a few hundred entries with other answers."""
    insert_disjoint: float
    """Of a ball that overlaps none."""


@dataclass(frozen=True)
class RetrievalTime:
    """Milliseconds of the retrieval for one batch and of the forward of that batch, the fastest of several."""

    model: str
    search: str
    """What is searched: the nearest key of each prompt, that of each token (`neuraldb`), or the mask that overlaps most (`memoir`)."""
    rows: int
    entries: int
    width: int
    retrieval: float
    forward: float

    @property
    def share(self) -> float:
        return self.retrieval / self.forward


@dataclass(frozen=True)
class CodebookBytes:
    """Bytes of the entries of a codebook, as measured on one allocation."""

    values: str
    entries: int
    key_bytes: int
    value_bytes: int
    memory_bytes: int
    """Keys, what a search keeps of them, and values."""
    disk_bytes: int


def codebook_rows(config: BenchConfig) -> Rows:
    """Retrieval beside the forward of each model, insertion, bytes."""
    for name in config.model:
        handle = open_model(name, config.device, config.dtype)
        yield retrieval(handle, config.open_stream(handle.reads_pictures))
    yield insertion()
    yield [codebook_bytes()]


def draw_keys(n: int, width: int, seed: int = 0) -> Tensor:
    """(n, width) keys in clusters around a common mean."""
    g = torch.Generator().manual_seed(seed)
    centres = 1 + torch.randn(-(-n // _CLUSTER), width, generator=g)
    keys = torch.empty(n, width).normal_(generator=g).mul_(0.3)
    for i, part in enumerate(keys.split(_CLUSTER)):
        part += centres[i]
    return keys


def insertion(sizes: tuple[int, ...] = SIZES, width: int = 512, times: int = 50) -> list[InsertionTime]:
    """Insertion at rising sizes, in one codebook that grows from empty."""
    keys, out = draw_keys(max(sizes) + 2 * times * len(sizes), width), []
    codebook, distance = Codebook(width), 0.3 * width**0.5
    for n in sizes:
        while len(codebook) < n:
            insert_next(codebook, keys, distance * 0.2)
        middle = []
        for radius in (distance * 1.5, 0.0):
            spent = [seconds_of(CPU, lambda r=radius: insert_next(codebook, keys, r))[0] for _ in range(times)]
            middle.append(1e3 * sorted(spent)[times // 2])
        out.append(InsertionTime(n, *middle))
    return out


def insert_next(codebook: Codebook, keys: Tensor, radius: float) -> None:
    """Insert the next of the keys (n, width) with this radius."""
    i = len(codebook)
    codebook.insert(keys[i], radius, Entry(f"{i:016x}", (i % 97, i % 3)))


def retrieval(handle: ModelHandle, stream: Stream, sizes: tuple[int, ...] = SIZES, rows: int = 32) -> list[RetrievalTime]:
    """Retrieval among keys of the model's inner width, beside its forward on questions of the stream."""
    asks, _ = questions_about(handle, stream, stream.events(rows), rows)
    batch = collate(handle, asks, side="left")
    with torch.no_grad():
        forward = _fastest(lambda: handle.model(**batch.inputs, use_cache=False), 7)
    width = handle.parameter(handle.down_weight(-1)).numel() // handle.width
    searches = {
        "key of each prompt": lambda n: _search_time(n, width, rows),
        "key of each token": lambda n: _search_time(n, width, batch.prompt.numel(), "cosine"),
        "mask of each prompt": lambda n: _overlap_time(n, width, rows),
    }
    return [RetrievalTime(handle.name, what, rows, n, width, time(n), 1e3 * forward) for what, time in searches.items() for n in sizes]


def _search_time(n: int, width: int, rows: int, metric: Metric = "euclidean") -> float:
    """Milliseconds of one search, in which half of the queries lie near a key."""
    keys = draw_keys(n, width)
    radius = 0.1 * width**0.5 if metric == "euclidean" else 0.35
    search = Nearest(Keys(keys, metric), torch.full((n,), radius, dtype=torch.float64))
    queries = torch.cat([keys[: max(1, rows // 2)] + 0.01, draw_keys(rows, width, 1)])[:rows]
    return 1e3 * _fastest(lambda: search(queries), 7)


def _overlap_time(n: int, width: int, rows: int) -> float:
    """Milliseconds of the comparison of masks, of two sevenths of the columns, with all that are stored."""
    k = round(width * 2 / 7)
    generator = torch.Generator().manual_seed(0)
    masks = torch.cat([packed(torch.rand(min(500, n - at), width, generator=generator).topk(k).indices, width) for at in range(0, n, 500)])
    router = OverlapRouter([str(i) for i in range(n)], masks, k, 0.4)
    return 1e3 * _fastest(lambda: router.retrieve(masks[:rows]), 7)


def codebook_bytes(entries: int = 10_000, width: int = WIDTH_7B, inner: int = INNER_7B) -> CodebookBytes:
    """Rank-4 values of one down-projection, with keys of its inner width: allocated, searched once, and saved."""
    with torch.device("meta"):
        module = torch.nn.Linear(inner, width, bias=False)
    weights = LowRankWeights(module, module.weight, RANK)
    keys = Keys(torch.zeros(0, inner))
    for start in range(0, entries, 500):
        keys.add(torch.full((min(500, entries - start), inner), float(start)))
    values = {f"{i:016x}": torch.zeros(weights.shape) for i in range(entries)}
    value_bytes = sum(v.nbytes for v in values.values())
    Nearest(keys, torch.ones(entries, dtype=torch.float64))(keys.all[:1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step-000001.safetensors"
        write_state(path, {"keys": keys.all, **values})
        disk = path.stat().st_size
    out = CodebookBytes(f"rank {RANK} of {inner} x {width}", entries, keys.all.nbytes, value_bytes, keys.nbytes + value_bytes, disk)
    del keys, values
    gc.collect()
    return out


def _fastest(work: Callable[[], object], times: int) -> float:
    """CPU seconds, the least of several after a first time that is not counted."""
    work()
    return min(seconds_of(CPU, work)[0] for _ in range(times))
