"""Second moments of keys in general text: one pass for all layers, with a stopping rule, kept by model, text and layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from testbed.editors.base import BadEditor
from testbed.editors.locate.corpus import Corpus
from testbed.model.encoding import Batch, answer_ids, collate, text_batch
from testbed.model.handle import ModelHandle
from testbed.storage.files import replacing
from testbed.storage.shared_cache import alone

_ROWS = 32
_TOKENS_PER_DIRECTION = 10
"""Tokens a direction of the key space before the stopping rule may end the pass."""
_SETTLED = 0.02
"""The pass ends when C moves by less than this share (Frobenius) between two doublings of the corpus."""


def second_moments(handle: ModelHandle, corpus: Corpus, layers: Sequence[int], folder: Path | None = None) -> dict[int, Tensor]:
    """`C = E[k k^T]` (f, f) float64 of each layer over the corpus's positions that hold text, under the base weights.

    Kept on the handle, and with a folder on disk, by (model, corpus, layer): statistics of another model or text
    cannot be taken for these. Without a folder, the shelf of the handle is one.
    """
    kept: dict[tuple[str, str, int], Tensor] = handle.cache.setdefault("second moments", {})
    name = (handle.hash, corpus.hash)
    missing = [n for n in layers if (*name, n) not in kept]
    if missing and folder is None and handle.shelf is not None:
        # layers that are read together end together, so runs share what was read together and get what they would have made
        folder = handle.shelf / f"moments-of-{'-'.join(map(str, missing))}"
    if missing:
        with alone(folder / "moments") if folder is not None else nullcontext():
            _fill(handle, corpus, missing, folder)
    return {n: kept[(*name, n)] for n in layers}


def _fill(handle: ModelHandle, corpus: Corpus, missing: Sequence[int], folder: Path | None) -> None:
    """Read what the folder has, compute the rest, and keep it in both places."""
    kept: dict[tuple[str, str, int], Tensor] = handle.cache["second moments"]
    name = (handle.hash, corpus.hash)
    if folder is not None:
        stored = {n: _stored(_file(folder, *name, n), handle.place(n)) for n in missing}
        kept.update({(*name, n): c for n, c in stored.items() if c is not None})
    missing = [n for n in missing if (*name, n) not in kept]
    for n, c in (_collect(handle, corpus, missing) if missing else {}).items():
        kept[(*name, n)] = c
        if folder is not None:
            with replacing(_file(folder, *name, n)) as temporary:
                save_file({"c": c.cpu()}, temporary)


def _file(folder: Path, model: str, corpus: str, layer: int) -> Path:
    return folder / f"moments-{model}-{corpus}-{layer}.safetensors"


def _stored(path: Path, place: torch.device) -> Tensor | None:
    """None where there is no file. Raises `BadEditor` for one that cannot be read."""
    if not path.is_file():
        return None
    try:
        return load_file(path)["c"].to(place)
    except (SafetensorError, OSError, KeyError) as e:
        raise BadEditor(f"second moments {path} cannot be read ({e}): remove the file, and they are computed anew") from e


@torch.no_grad()
def _collect(handle: ModelHandle, corpus: Corpus, layers: list[int]) -> dict[int, Tensor]:
    from testbed.model.progress import bars  # rich draws from the global generator when it is imported

    sums: dict[int, Tensor] = {}
    count, mark, total = 0, _Mark(), _number(corpus)
    with bars() as progress:
        for done, batch in enumerate(_batches(handle, corpus), 1):
            keep = (batch.prompt & ~batch.picture) | batch.answer
            for layer, keys in _keys(handle, batch, keep, layers).items():
                sums[layer] = sums[layer] + keys.T @ keys if layer in sums else keys.T @ keys
            count += int(keep.sum())
            progress.advance("second moments", done, total)
            if mark.settled(sums, count):
                progress.advance("second moments", total, total)
                break
    return {n: s / count for n, s in sums.items()}


def _number(corpus: Corpus) -> int:
    """Batches of the whole corpus."""
    return -(-len(corpus.asks) // _ROWS) + -(-len(corpus.texts) // _ROWS)


def _keys(handle: ModelHandle, batch: Batch, keep: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """(n, f) float64 inputs of the layers' down-projections at the kept positions."""
    seen: dict[int, Tensor] = {}

    def hook(layer: int) -> Callable[..., None]:
        def read(module: Any, args: tuple[Tensor, ...]) -> None:
            seen[layer] = args[0].reshape(*keep.shape, -1)[keep.to(args[0].device)].double()

        return read

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(handle.hooked(handle.down(layer), hook(layer), pre=True))
        handle.model(**batch.inputs, use_cache=False)
    return seen


class _Mark:
    """The stopping rule: C at every doubling of the corpus, compared with the last."""

    def __init__(self) -> None:
        self.count = 0
        self.at: dict[int, Tensor] = {}

    def settled(self, sums: dict[int, Tensor], count: int) -> bool:
        width = max(len(s) for s in sums.values())
        if count < max(2 * self.count, _TOKENS_PER_DIRECTION * width):
            return False
        now = {n: s / count for n, s in sums.items()}
        moved = [float((now[n] - c).norm() / now[n].norm().clamp(min=1e-30)) for n, c in self.at.items()]
        self.at, self.count = now, count
        return bool(moved) and max(moved) < _SETTLED


def _batches(handle: ModelHandle, corpus: Corpus) -> Iterator[Batch]:
    """Questions and texts in turn, so that a pass that ends early has seen both."""
    tok = handle.tokenizer
    start = [tok.bos_token_id] if tok.bos_token_id is not None else []
    n = max(len(corpus.asks), len(corpus.texts))
    for at in range(0, n, _ROWS):
        asks, answers = corpus.asks[at : at + _ROWS], corpus.answers[at : at + _ROWS]
        if asks:
            yield collate(handle, asks, [answer_ids(handle, a, x) for a, x in zip(asks, answers)])
        ids = [(start + tok(t, add_special_tokens=False)["input_ids"])[: handle.window] for t in corpus.texts[at : at + _ROWS]]
        if any(ids):
            yield text_batch(handle, [x for x in ids if x])
