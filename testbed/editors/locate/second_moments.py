"""Second moments C = E[k k^T] of keys in general text: one pass for all layers, with a stopping rule, kept by model, text and layer.

The text is the stream's train pool, a text file, or a dataset by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import Ask, content_id
from testbed.editors.base import BadEditor
from testbed.model.encoding import Batch, answer_ids, collate, text_batch, text_tokens
from testbed.model.handle import ModelHandle
from testbed.storage.files import replacing
from testbed.storage.shared_cache import exclusive

_ROWS = 32
_TOKENS_PER_DIRECTION = 10
"""Tokens a direction of the key space before the stopping rule may end the pass."""
_SETTLED = 0.02
"""The pass ends when C moves by less than this share (Frobenius) between two doublings of the corpus."""
_DATASET = re.compile("hub:(.+)")
"""`hub:DATASET[:CONFIG[:SPLIT[:FIELD]]]` names a dataset of the `datasets` library."""
_DOCUMENTS = 100_000
"""Texts read of a dataset at most (Meng et al. 2022 read as many)."""


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


def corpus_of(pool: TrainPool, source: str | None) -> Corpus:
    """The train pool, or what `source` names in its place: a text file or `hub:...`. Raises `BadEditor` for one without text."""
    if source is not None:
        named = _DATASET.fullmatch(source)
        texts = _dataset(named[1]) if named else _text_file(Path(source))
        if not texts:
            raise BadEditor(f"corpus {source} holds no line of text")
        return Corpus((), (), texts)
    known = [q for q in pool.questions if q.answer]
    corpus = Corpus(tuple(q.ask() for q in known), tuple(q.answer or "" for q in known), pool.texts)
    if not (corpus.asks or corpus.texts):
        raise BadEditor(
            "second moments need general text, and the stream has no train pool: "
            "--set EDITOR.corpus=FILE names a text file, --set EDITOR.corpus=hub:DATASET a dataset"
        )
    return corpus


def _text_file(path: Path) -> tuple[str, ...]:
    """One text a line. Raises `BadEditor` for a file that is absent or no text."""
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as e:
        raise BadEditor(f"corpus {path} cannot be read as text: {e}") from e


def _dataset(argument: str) -> tuple[str, ...]:
    """One text a row, of the first 100,000. Raises `BadEditor` for a dataset or a field that is not there."""
    import datasets

    name, part, split, field = [*argument.split(":"), *[""] * 4][:4]
    where = f"corpus hub:{name} (configuration {part or 'default'}, split {split or 'train'})"
    try:
        saved = (Path(name) / "state.json").is_file()
        rows: Any = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, part or None, split=split or "train")
    except Exception as e:  # datasets raises many kinds; each is a source that cannot be used
        raise BadEditor(f"{where} cannot be loaded: {' '.join(str(e).split())[:300]}") from e
    if (field or "text") not in rows.column_names:
        raise BadEditor(f"{where} has no field {field or 'text'!r}; there are {', '.join(rows.column_names)}")
    found = rows.select(range(min(len(rows), _DOCUMENTS)))[field or "text"]
    return tuple(text.strip() for text in found if isinstance(text, str) and text.strip())


def second_moments(handle: ModelHandle, corpus: Corpus, layers: Sequence[int], folder: Path | None = None) -> dict[int, Tensor]:
    """`C = E[k k^T]` (f, f) float64 of each layer over the corpus's positions that hold text, under the base weights.

    Kept on the handle, and with a folder on disk, by (model, corpus, layer): statistics of another model or text
    cannot be taken for these. Without a folder, the handle's own cache folder is one.
    """
    kept: dict[tuple[str, str, int], Tensor] = handle.cache.setdefault("second moments", {})
    name = (handle.hash, corpus.hash)
    missing = [n for n in layers if (*name, n) not in kept]
    if missing and folder is None and handle.cache_folder is not None:
        # layers that are read together end together, so runs share what was read together and get what they would have made
        folder = handle.cache_folder / f"moments-of-{'-'.join(map(str, missing))}"
    if missing:
        with exclusive(folder / "moments") if folder is not None else nullcontext():
            _fill(handle, corpus, missing, folder)
    return {n: kept[(*name, n)] for n in layers}


def _fill(handle: ModelHandle, corpus: Corpus, missing: Sequence[int], folder: Path | None) -> None:
    """Read what the folder has, compute the rest, and keep it in both places."""
    kept: dict[tuple[str, str, int], Tensor] = handle.cache["second moments"]
    name = (handle.hash, corpus.hash)
    if folder is not None:
        stored = {n: _stored(_file(folder, *name, n), handle.layer_device(n)) for n in missing}
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
    count, rule, total = 0, _StoppingRule(), _number(corpus)
    with bars() as progress:
        for done, batch in enumerate(_batches(handle, corpus), 1):
            keep = (batch.prompt & ~batch.picture) | batch.answer
            for layer, keys in _keys(handle, batch, keep, layers).items():
                sums[layer] = sums[layer] + keys.T @ keys if layer in sums else keys.T @ keys
            count += int(keep.sum())
            progress.advance("second moments", done, total)
            if rule.settled(sums, count):
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


class _StoppingRule:
    """C at every doubling of the corpus, compared with the last."""

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
    n = max(len(corpus.asks), len(corpus.texts))
    for at in range(0, n, _ROWS):
        asks, answers = corpus.asks[at : at + _ROWS], corpus.answers[at : at + _ROWS]
        if asks:
            yield collate(handle, asks, [answer_ids(handle, a, x) for a, x in zip(asks, answers)])
        ids = [text_tokens(handle, t) for t in corpus.texts[at : at + _ROWS]]
        if any(ids):
            yield text_batch(handle, [x for x in ids if x])
