"""General text for second moments: the stream's train pool, a text file, or a dataset by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streams.base import TrainPool
from testbed.core.events import Ask, content_id
from testbed.editors.base import BadEditor

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
        texts = _dataset(named[1]) if named else _file(Path(source))
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


def _file(path: Path) -> tuple[str, ...]:
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
