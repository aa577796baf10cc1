"""What a codebook costs by its size: insertion, retrieval against a forward, bytes in memory and on disk.

Keys are drawn, not read: four hundred to a cluster, as activations of one kind of question lie. Forwards are
the tiny model's on real questions, and a decoder layer's of the shape of a 7B Llama (4,096 wide, 11,008
inside, 32 layers; one layer is timed and counted 32 times, embeddings and head left out). Times are CPU time, in
which other work on the machine does not count.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streams.base import Stream
from testbed.editors.codebook.codebook import Codebook, Entry
from testbed.editors.codebook.entry_weights import LowRankWeights
from testbed.editors.codebook.nearest import Keys, Nearest
from testbed.model.encoding import collate
from testbed.model.handle import ModelHandle
from testbed.storage.files import write_state

WIDTH_7B, INNER_7B, LAYERS_7B = 4096, 11008, 32
RANK = 4
_CLUSTER = 400


@dataclass(frozen=True)
class Size:
    """A codebook of so many entries, in milliseconds an operation."""

    entries: int
    insert: float
    """One insertion, the median of fifty, of a ball that meets those of a few hundred others with other answers."""
    insert_bare: float
    """The same where no ball is met."""


@dataclass(frozen=True)
class Share:
    """Retrieval for one batch, against the forward of that batch; milliseconds, the least of several."""

    model: str
    rows: int
    entries: int
    width: int
    retrieval: float
    forward: float

    @property
    def share(self) -> float:
        return self.retrieval / self.forward


@dataclass(frozen=True)
class Weight:
    """Bytes of 10,000 rank-4 entries, as measured on one allocation."""

    what: str
    entries: int
    keys: int
    values: int
    memory: int
    """Keys with what a search keeps of them, and values."""
    disk: int


def drawn(n: int, width: int, seed: int = 0) -> Tensor:
    """(n, width) keys in clusters around a common mean."""
    g = torch.Generator().manual_seed(seed)
    centres = 1 + torch.randn(-(-n // _CLUSTER), width, generator=g)
    keys = torch.empty(n, width).normal_(generator=g).mul_(0.3)
    for i, part in enumerate(keys.split(_CLUSTER)):
        part += centres[i]
    return keys


def insertion(sizes: tuple[int, ...] = (100, 1_000, 10_000, 20_000), width: int = 512, times: int = 50) -> list[Size]:
    """Insertion at rising sizes, in one codebook that grows from nothing by insertions."""
    keys = drawn(max(sizes) + 2 * times * len(sizes), width)
    reach = 0.3 * width**0.5
    book, out = Codebook(width), []
    for n in sizes:
        while len(book) < n:
            _insert(book, keys, reach * 0.2)
        met = [_timed(lambda: _insert(book, keys, reach * 1.5)) for _ in range(times)]
        bare = [_timed(lambda: _insert(book, keys, 0.0)) for _ in range(times)]
        out.append(Size(n, 1e3 * sorted(met)[times // 2], 1e3 * sorted(bare)[times // 2]))
    return out


def _insert(book: Codebook, keys: Tensor, radius: float) -> None:
    i = len(book)
    book.insert(keys[i], radius, Entry(f"{i:016x}", (i % 97, i % 3)))


def tiny_share(handle: ModelHandle, stream: Stream, sizes: tuple[int, ...] = (100, 1_000, 10_000, 20_000), rows: int = 32) -> list[Share]:
    """Retrieval among keys of the model's own inner width against its forward, on picture questions where it reads pictures."""
    asks = [q.ask() for e in stream.events(rows) for q in stream.questions(e)]
    batch = collate(handle, [a for a in asks if (a.image is not None) == handle.reads_pictures][:rows], side="left")
    with torch.no_grad():
        forward = _least(lambda: handle.model(**batch.inputs, use_cache=False), 7)
    width = handle.parameter(handle.down_weight(-1)).numel() // handle.width
    return [Share(handle.name, rows, n, width, _retrieval(n, width, rows), 1e3 * forward) for n in sizes]


def large_share(n: int = 10_000, rows: int = 1, length: int = 64) -> list[Share]:
    """The same against 32 layers of a 7B shape in bfloat16, one prompt of 64 tokens, keys 512 and 11,008 wide."""
    forward = 1e3 * LAYERS_7B * _layer_forward(rows, length)
    name = f"{LAYERS_7B} layers of a 7B shape, {length} tokens"
    return [Share(name, rows, n, width, _retrieval(n, width, rows), forward) for width in (512, INNER_7B)]


def _retrieval(n: int, width: int, rows: int) -> float:
    """Milliseconds of one search; half of the queries lie near a key."""
    keys = drawn(n, width)
    search = Nearest(Keys(keys), torch.full((n,), 0.1 * width**0.5, dtype=torch.float64))
    queries = keys[: max(1, rows // 2)] + 0.01
    queries = torch.cat([queries, drawn(rows, width, 1)])[:rows]
    return 1e3 * _least(lambda: search(queries), 7)


@torch.no_grad()
def _layer_forward(rows: int, length: int) -> float:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=WIDTH_7B, intermediate_size=INNER_7B, num_attention_heads=32)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, 0)
    layer = layer.to_empty(device="cpu").to(torch.bfloat16).eval()
    for p in layer.parameters():
        p.fill_(0.01)
    hidden = torch.randn(rows, length, WIDTH_7B, generator=torch.Generator().manual_seed(0)).bfloat16()
    places = torch.arange(length)[None]
    turned = LlamaRotaryEmbedding(config)(hidden, places)
    return _least(lambda: layer(hidden, position_embeddings=turned, position_ids=places), 5)


def weight(entries: int = 10_000, width: int = WIDTH_7B, inner: int = INNER_7B) -> Weight:
    """Rank-4 values of one down-projection with keys as wide as what enters it: allocated, searched once, and saved."""
    with torch.device("meta"):
        module = torch.nn.Linear(inner, width, bias=False)
    family = LowRankWeights(module, module.weight, RANK)
    keys = Keys(torch.zeros(0, inner))
    for start in range(0, entries, 500):
        keys.add(torch.full((min(500, entries - start), inner), float(start)))
    values = {f"{i:016x}": torch.zeros(family.shape) for i in range(entries)}
    held = sum(v.nbytes for v in values.values())
    Nearest(keys, torch.ones(entries, dtype=torch.float64))(keys.all[:1])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step-000001.safetensors"
        write_state(path, {"keys": keys.all, **values})
        disk = path.stat().st_size
    out = Weight(f"rank {RANK} of {inner} x {width}", entries, keys.all.nbytes, held, keys.nbytes + held, disk)
    del keys, values
    gc.collect()
    return out


def _timed(what: Callable[[], object]) -> float:
    start = time.process_time()
    what()
    return time.process_time() - start


def _least(what: Callable[[], object], times: int) -> float:
    """CPU seconds, the least of several after one that warms up."""
    what()
    return min(_timed(what) for _ in range(times))
