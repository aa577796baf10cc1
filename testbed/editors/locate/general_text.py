"""General text, from which second moments of keys are estimated: a file, a dataset, WikiText, or what the model itself writes.

A stream's own running text comes first, because a model that was trained on it has no other; pictures come with its
questions alone. Questions of a stream of records are no general text. A corpus is read in a random order that is always the
same, so that a pass that ends early has seen a sample of it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from streams.base import TrainPool
from testbed.core.events import Ask, content_id
from testbed.editors.base import BadEditor
from testbed.model.encoding import text_tokens
from testbed.model.handle import ModelHandle

LONGEST = 2048
"""Tokens of one text that are read, at most."""
_DATASET = re.compile("hub:(.+)")
"""`hub:DATASET[:CONFIG[:SPLIT[:FIELD]]]` names a dataset of the `datasets` library."""
_DOCUMENTS = 100_000
"""Texts of a dataset at most, a sample of it (Meng et al. 2022 read as many)."""
_WIKITEXT = {"Salesforce/wikitext": ("wikitext-103-raw-v1", "wikitext-2-raw-v1"), "wikitext": ("wikitext-103-raw-v1", "wikitext-2-raw-v1")}
"""Names of WikiText among the datasets that a machine has read before."""
_FILES = ("wiki*train*", "wikitext*/**/*train*", "wiki*valid*", "wikitext*/**/*valid*")
"""Where WikiText lies under a data root, the larger part first; its test part is for perplexity."""
_SUFFIXES = (".txt", ".tokens", ".raw")
_ROWS, _LENGTH, _ROUNDS = 16, 128, 200
"""Texts that the model writes at once, their length in tokens, and how often it is asked for more."""


@dataclass(frozen=True)
class Corpus:
    """General text: questions with their answers as they are asked, and running text as token ids, in the order of reading."""

    source: str
    """What it is, for the reader of a report."""
    hash: str
    asks: tuple[Ask, ...]
    answers: tuple[str, ...]
    sequences: Callable[[ModelHandle], Iterator[list[int]]]
    slow: bool = False
    """Each text costs far more to make than to read, so that no more is read than is needed."""


def corpus_of(handle: ModelHandle, pool: TrainPool, named: str | None) -> Corpus:
    """The text that `named` gives; else the stream's own running text, WikiText, or what the model writes, the first that there is.

    Raises `BadEditor` for a named source without text.
    """
    if named is not None:
        dataset = _DATASET.fullmatch(named)
        texts = _dataset(dataset[1]) if dataset else text_file(Path(named))
        if not texts:
            raise BadEditor(f"corpus {named} holds no line of text")
        return _of_texts(named, texts)
    known = [q for q in pool.questions if q.answer]
    if pool.texts or any(q.image is not None for q in known):
        return _of_texts("the stream's train pool", pool.texts, [q.ask() for q in known], [q.answer or "" for q in known])
    wikitext = _wikitext(handle.data_root)
    return _of_texts(*wikitext) if wikitext is not None else _written_by_the_model(handle)


def corpus_problem(named: str) -> str | None:
    """What is wrong with a named source, as far as it can be told without a model; None where nothing is."""
    try:
        if not _DATASET.fullmatch(named):
            text_file(Path(named))
        elif not find_spec("datasets"):
            raise BadEditor(f"corpus {named} needs the package datasets: pip install datasets")
    except BadEditor as e:
        return str(e)
    return None


def _of_texts(source: str, texts: Sequence[str], asks: Sequence[Ask] = (), answers: Sequence[str] = ()) -> Corpus:
    keys = [a.image.key if a.image is not None else None for a in asks]
    name = content_id("corpus", [a.prompt for a in asks], keys, list(answers), list(texts))
    order = _shuffled(len(texts))
    return Corpus(source, name, tuple(asks), tuple(answers), lambda handle: (text_tokens(handle, texts[i])[:LONGEST] for i in order))


def _shuffled(n: int) -> list[int]:
    order = list(range(n))
    random.Random(n).shuffle(order)
    return order


def text_file(path: Path) -> tuple[str, ...]:
    """One text a line, without WikiText's headings. Raises `BadEditor` for a file that is absent or no text."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise BadEditor(f"corpus {path} cannot be read as text: {e}") from e
    return tuple(line.strip() for line in lines if line.strip() and not line.strip().startswith("= "))


def _dataset(argument: str, **options: Any) -> tuple[str, ...]:
    """One text a row, of a sample of 100,000. Raises `BadEditor` for a dataset or a field that is not there."""
    import datasets

    name, part, split, field = [*argument.split(":"), *[""] * 4][:4]
    where = f"corpus hub:{name} (configuration {part or 'default'}, split {split or 'train'})"
    try:
        saved = (Path(name) / "state.json").is_file()
        rows: Any = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, part or None, split=split or "train", **options)
    except Exception as e:  # datasets raises many kinds; each is a source that cannot be used
        raise BadEditor(f"{where} cannot be loaded: {' '.join(str(e).split())[:300]}") from e
    if (field or "text") not in rows.column_names:
        raise BadEditor(f"{where} has no field {field or 'text'!r}; there are {', '.join(rows.column_names)}")
    found = rows.select(sorted(_shuffled(len(rows))[:_DOCUMENTS]))[field or "text"]
    return tuple(text.strip() for text in found if isinstance(text, str) and text.strip() and not text.strip().startswith("= "))


def _wikitext(root: Path | None) -> tuple[str, tuple[str, ...]] | None:
    """WikiText and where it was found: under the data root, or among the datasets that this machine has read before."""
    for path in (p for pattern in _FILES if root is not None for p in sorted(root.rglob(pattern)) if p.suffix in _SUFFIXES):
        return f"WikiText ({path})", text_file(path)
    if find_spec("datasets"):
        import datasets

        kept = Path(datasets.config.HF_DATASETS_CACHE)  # pyright: ignore[reportAttributeAccessIssue]
        for name, parts in _WIKITEXT.items():
            for part in parts:
                if (kept / name.replace("/", "___") / part).is_dir():
                    offline = datasets.DownloadConfig(local_files_only=True)
                    return f"WikiText ({name}, {part})", _dataset(f"{name}:{part}", download_config=offline)
    return None


def _written_by_the_model(handle: ModelHandle) -> Corpus:
    source = "text that the model wrote itself, because the stream has no running text and no WikiText was found"
    return Corpus(source, content_id("written by the model", _ROWS, _LENGTH), (), (), _write, slow=True)


@torch.no_grad()
def _write(handle: ModelHandle) -> Iterator[list[int]]:
    """Texts sampled from the model after its begin token, the same ones each time; the caller takes as many as it needs."""
    from transformers import GenerationConfig

    tok = handle.tokenizer
    begin = tok.bos_token_id if tok.bos_token_id is not None else tok.eos_token_id
    skipped = 0 if tok("a")["input_ids"][:1] == [begin] else 1
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=min(_LENGTH, handle.window - 1),
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    devices = [handle.device] if handle.device.type == "cuda" else []
    first = torch.full((_ROWS, 1), begin, device=handle.device)
    for seed in range(_ROUNDS):
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            rows = handle.model.generate(input_ids=first, attention_mask=torch.ones_like(first), generation_config=config)
        for row in rows.tolist():
            end = row.index(tok.eos_token_id, 1) if tok.eos_token_id in row[1:] else len(row)
            yield row[skipped:end]


def blocks(sequences: Iterator[list[int]], tokens: int, block: int) -> Iterator[list[list[int]]]:
    """Batches of texts of like length, each of so many tokens at most when padded, from blocks of texts in the order of reading."""
    while found := list(islice(sequences, block)):
        batch: list[list[int]] = []
        for ids in sorted(filter(None, found), key=len):
            if batch and (len(batch) + 1) * len(ids) > tokens:
                yield batch
                batch = []
            batch.append(ids)
        yield from filter(None, [batch])
