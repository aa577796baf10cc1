"""Second moments of keys in general text: one pass for all layers, with a stopping rule, cached on the handle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streams.base import TrainPool
from testbed.editors.base import BadEditor
from testbed.encode import Ask, Batch, answer_ids, collate, text_batch
from testbed.events import content_id
from testbed.models import ModelHandle

_ROWS = 32
_TOKENS_PER_DIRECTION = 10
"""Tokens a direction of the key space before the stopping rule may end the pass."""
_SETTLED = 0.02
"""The pass ends when C moves by less than this share (Frobenius) between two doublings of the corpus."""


@dataclass(frozen=True)
class Corpus:
    """General text: questions with their answers as they are asked, and running text."""

    asks: tuple[Ask, ...]
    answers: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def hash(self) -> str:
        keys = [a.image.key if a.image is not None else None for a in self.asks]
        return content_id("corpus", [a.prompt for a in self.asks], keys, self.answers, self.texts)


def corpus_of(pool: TrainPool, file: Path | None) -> Corpus:
    """The train pool, or the lines of a text file in its place. Raises `BadEditor` for one without text."""
    if file is not None:
        try:
            texts = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as e:
            raise BadEditor(f"corpus {file} cannot be read as text: {e}") from e
        if not texts:
            raise BadEditor(f"corpus {file} holds no line of text")
        return Corpus((), (), texts)
    known = [q for q in pool.questions if q.answer]
    corpus = Corpus(tuple(Ask(q.prompt, q.image) for q in known), tuple(q.answer or "" for q in known), pool.texts)
    if not (corpus.asks or corpus.texts):
        raise BadEditor("second moments need general text, and the stream has no train pool: --set EDITOR.corpus=FILE names a text file")
    return corpus


def second_moments(handle: ModelHandle, corpus: Corpus, layers: Sequence[int]) -> dict[int, Tensor]:
    """`C = E[k k^T]` (f, f) float64 of each layer over the corpus's positions that hold text, under the base weights.

    Kept on the handle by (model, corpus, layer), so statistics of another model cannot be taken for this one's.
    """
    kept: dict[tuple[str, str, int], Tensor] = handle.cache.setdefault("second moments", {})
    name = (handle.hash, corpus.hash)
    missing = [n for n in layers if (*name, n) not in kept]
    if missing:
        kept.update({(*name, n): c for n, c in _collect(handle, corpus, missing).items()})
    return {n: kept[(*name, n)] for n in layers}


@torch.no_grad()
def _collect(handle: ModelHandle, corpus: Corpus, layers: list[int]) -> dict[int, Tensor]:
    sums: dict[int, Tensor] = {}
    count, mark = 0, _Mark()
    for batch in _batches(handle, corpus):
        keep = (batch.prompt & ~batch.picture) | batch.answer
        for layer, keys in _keys(handle, batch, keep, layers).items():
            sums[layer] = sums[layer] + keys.T @ keys if layer in sums else keys.T @ keys
        count += int(keep.sum())
        if mark.settled(sums, count):
            break
    return {n: s / count for n, s in sums.items()}


def _keys(handle: ModelHandle, batch: Batch, keep: Tensor, layers: list[int]) -> dict[int, Tensor]:
    """(n, f) float64 inputs of the layers' down-projections at the kept positions."""
    seen: dict[int, Tensor] = {}

    def hook(layer: int) -> Callable[..., None]:
        def read(module: Any, args: tuple[Tensor, ...]) -> None:
            seen[layer] = args[0].reshape(*keep.shape, -1)[keep].double()

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
