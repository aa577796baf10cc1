"""Second moments C = E[k k^T] of keys in general text, a layer at a time: estimated, kept on disk, or read from published files.

A pass reads text until C of a layer has settled. Every layer ends by itself, so that C depends on the model, the text and
the layer alone, and a method finds what another one left.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from testbed.editors.base import BadEditor
from testbed.editors.locate.general_text import Corpus, blocks
from testbed.model.encoding import Batch, answer_ids, collate, text_batch
from testbed.model.handle import ModelHandle
from testbed.model.prefix_cache import LastLayerReached
from testbed.storage.files import replacing
from testbed.storage.shared_cache import exclusive

_ROWS, _TOKENS, _BLOCK = 32, 16_384, 256
"""Questions of one forward, padded tokens of one forward of running text, and texts that are sorted by length together."""
_WANTED, _MOST, _REFUSED = 10, 20, 2
"""Tokens a direction of the key space before the pass may end, at which it ends, and under which C is refused."""
_CHUNK = 512
"""Keys of one product in the model's own precision; these products are added in float64, so that their rounding averages out."""
_SETTLED = 0.02
"""The pass ends when C moves by less than this share (Frobenius) between two doublings of the corpus."""
_RANKED = 2048
"""Key widths up to which the rank of C is computed."""


@dataclass(frozen=True)
class SecondMoment:
    """c: (f, f) float64, E[k k^T] over `tokens` positions of text. ended: why no more text was read."""

    c: Float[Tensor, "f f"]
    tokens: int
    ended: str

    @property
    def a_dimension(self) -> float:
        return self.tokens / len(self.c)


def second_moments(
    handle: ModelHandle, corpus: Corpus, layers: Sequence[int], folder: Path | None = None, notes: list[str] | None = None
) -> dict[int, Tensor]:
    """C (f, f) float64 of each layer over the corpus's positions that hold text, under the base weights.

    Kept on the handle, and with a folder (or the handle's own cache folder) on disk, by model, corpus and layer. A folder may
    hold published statistics under MEMIT's names (`model.layers.5.mlp.down_proj_float32_mom2_100000.npz`); these go first.
    Raises `BadEditor` for a file that cannot be read and for a text of fewer than two tokens a key dimension.
    """
    kept: dict[tuple[str, str, int], SecondMoment] = handle.cache.setdefault("second moments", {})
    folder = folder or (handle.cache_folder / "second-moments" if handle.cache_folder is not None else None)
    names = {n: (handle.hash, corpus.hash, n) for n in layers}
    began = time.perf_counter()

    def missing() -> list[int]:
        """The layers that neither the handle nor the folder has; what the folder has goes to the handle."""
        for n in [n for n in layers if names[n] not in kept and folder is not None]:
            stored = _stored(handle, folder, names[n]) if folder is not None else None
            kept.update({names[n]: stored} if stored is not None else {})
        return [n for n in layers if names[n] not in kept]

    computed = missing()
    if computed:
        with exclusive(folder / "second-moments") if folder is not None else nullcontext():
            for n, found_c in (_collect(handle, corpus, still) if (still := missing()) else {}).items():
                kept[names[n]] = found_c
                if folder is not None:
                    _store(folder, names[n], found_c)
    found = {n: kept[names[n]] for n in layers}
    message = _message(found, corpus.source, time.perf_counter() - began if computed else None)
    if notes is not None:
        notes.append(message)
    return {n: found_c.c for n, found_c in found.items()}


def _message(found: dict[int, SecondMoment], source: str, seconds: float | None) -> str:
    """One line on the statistics. Raises `BadEditor` where the text is far too short for the width."""
    layer, least = min(found.items(), key=lambda item: item[1].a_dimension)
    width, rank = len(least.c), "not computed"
    if width <= _RANKED:
        rank = f"{int(torch.linalg.matrix_rank(least.c, hermitian=True)):,}"
    line = (
        f"second moments of layers {', '.join(map(str, found))} from {source}: {least.tokens:,} tokens, {least.a_dimension:.3g} a key "
        f"dimension (width {width:,}), rank {rank}; {least.ended}; " + ("kept from before" if seconds is None else f"{seconds:.1f} s")
    )
    if least.a_dimension < _REFUSED:
        raise BadEditor(f"{line}. Fewer than {_REFUSED} tokens a key dimension say nothing: give more text with corpus=FILE")
    few = f". Under {_WANTED} tokens a key dimension C is uncertain, here at layer {layer}: give more text with corpus=FILE"
    return line + (few if least.a_dimension < _WANTED else "")


def _file(folder: Path, name: tuple[str, str, int]) -> Path:
    return folder / f"second-moment-{'-'.join(map(str, name))}.safetensors"


def _store(folder: Path, name: tuple[str, str, int], second_moment: SecondMoment) -> None:
    with replacing(_file(folder, name)) as temporary:
        save_file({"c": second_moment.c.cpu()}, temporary, metadata={"tokens": str(second_moment.tokens), "ended": second_moment.ended})


def _stored(handle: ModelHandle, folder: Path, name: tuple[str, str, int]) -> SecondMoment | None:
    """What a folder has of a layer, published files first; None for nothing. Raises `BadEditor` for a file that cannot be read."""
    from safetensors import safe_open

    weight = handle.down_weight(name[2]).removesuffix(".weight")
    published, path = sorted(folder.glob(f"{weight}_*mom2*.npz")), _file(folder, name)
    if published:
        return _published(published[0], handle, name[2])
    if not path.is_file():
        return None
    try:
        c = load_file(path)["c"].to(handle.layer_device(name[2]))
        with safe_open(path, "pt") as file:
            about = file.metadata()
        return SecondMoment(c, int(about["tokens"]), about["ended"])
    except (SafetensorError, OSError, KeyError) as e:
        raise BadEditor(f"second moments {path} cannot be read ({e}): remove the file, and they are computed anew") from e


def _published(path: Path, handle: ModelHandle, layer: int) -> SecondMoment:
    """Statistics as MEMIT's code writes them: the sum of k k^T and the number of tokens."""
    f = handle.parameter(handle.down_weight(layer)).numel() // handle.width
    try:
        with np.load(path) as stored:
            total, count = stored["mom2.mom2"], int(stored["mom2.count"])
    except (OSError, KeyError, ValueError) as e:
        raise BadEditor(f"{path} holds no second moments as MEMIT's code writes them (mom2.mom2 and mom2.count): {e}") from e
    if total.shape != (f, f) or count < 1:
        raise BadEditor(f"{path} holds {total.shape} numbers of {count} tokens; the keys of layer {layer} of {handle.name} are {f} wide")
    c = torch.from_numpy(total).double() / count
    return SecondMoment(c.to(handle.layer_device(layer)), count, f"published statistics ({path.name})")


@torch.no_grad()
def _collect(handle: ModelHandle, corpus: Corpus, layers: list[int]) -> dict[int, SecondMoment]:
    from testbed.model.progress import bars  # rich draws from the global generator when it is imported

    sums = {n: _Sum(corpus.slow) for n in layers}
    with bars() as progress:
        for batch in corpus_batches(handle, corpus, _ROWS, _TOKENS):
            keep = (batch.prompt & ~batch.picture) | batch.answer
            going = [n for n, s in sums.items() if not s.ended]
            for n, keys in _keys(handle, batch, keep, going).items():
                sums[n].add(keys)
            share = min(s.progress for s in sums.values())
            progress.advance("second moments", int(100 * share), 100)
            if all(s.ended for s in sums.values()):
                break
    return {n: s.result() for n, s in sums.items()}


def _keys(handle: ModelHandle, batch: Batch, keep: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """(n, f) inputs of the layers' down-projections at the kept positions; nothing is run behind the last of them."""
    seen: dict[int, Tensor] = {}

    def read(layer: int, act: Tensor) -> None:
        seen[layer] = act.reshape(*keep.shape, -1)[keep.to(act.device)]
        if len(seen) == len(layers):
            raise LastLayerReached

    with ExitStack() as stack:
        for n in layers:
            stack.enter_context(handle.hooked(handle.down(n), lambda m, args, n=n: read(n, args[0]), pre=True))
        with suppress(LastLayerReached):
            handle.model(**batch.inputs, use_cache=False)
    return seen


class _Sum:
    """The sum of k k^T of one layer, and C at every doubling of the tokens, compared with the last. brief: end as soon as is allowed."""

    def __init__(self, brief: bool) -> None:
        self.brief = brief
        self.total: Any = 0.0
        self.count, self.next = 0, float(_WANTED)  # tokens, and tokens a dimension at the next comparison
        self.last: Tensor | None = None
        self.ended = ""
        """Why no more text is needed; empty as long as it is."""

    def add(self, keys: Tensor) -> None:
        for chunk in (keys if keys.dtype == torch.float64 else keys.float()).split(_CHUNK):
            self.total = self.total + (chunk.T @ chunk).double()
        self.count += len(keys)
        most = _WANTED if self.brief else _MOST
        if self.count >= self.next * keys.shape[1]:
            now = self.total / self.count
            moved = float((now - self.last).norm() / now.norm().clamp(min=1e-30)) if self.last is not None else torch.inf
            self.ended = f"settled within {_SETTLED:.0%} between two doublings" if moved < _SETTLED else ""
            self.last, self.next = now, 2 * self.next
        if not self.ended and self.count >= most * keys.shape[1]:
            self.ended = f"ended at {most} tokens a key dimension"

    @property
    def progress(self) -> float:
        """The share of the longest way; 1 at the end."""
        return 1.0 if self.ended else min(1.0, self.count / (_MOST * len(self.total))) if self.count else 0.0

    def result(self) -> SecondMoment:
        return SecondMoment(self.total / max(self.count, 1), self.count, self.ended or "the text ended before C had settled")


def corpus_batches(handle: ModelHandle, corpus: Corpus, rows: int, tokens: int) -> Iterator[Batch]:
    """Questions (`rows` a batch) and texts (`tokens` a batch, padding counted) in turn, so that a pass that ends early has seen both."""
    texts = (text_batch(handle, ids) for ids in blocks(corpus.sequences(handle), tokens, _BLOCK))
    for at in range(0, len(corpus.asks), rows):
        asks, answers = corpus.asks[at : at + rows], corpus.answers[at : at + rows]
        yield collate(handle, asks, [answer_ids(handle, a, x) for a, x in zip(asks, answers)])
        yield from (batch for batch in [next(texts, None)] if batch is not None)
    yield from texts
