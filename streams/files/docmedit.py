"""DocMEdit on a yearly schedule: articles before and after an update, several facts of which change in one edit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from streams.base import TrainPool
from streams.files.documents import DocumentReader, Documents
from streams.files.entry import FactEntry
from streams.files.entry_stream import EntryStream
from streams.files.fields import FieldMap, as_object, must_differ
from streams.files.records import normalize, text_at
from testbed.core.registry import STREAMS


@dataclass
class ArticleReader(DocumentReader):
    """Turns rows with a title and an article before and after its update into entries."""

    def entries(self, file: str, form: FieldMap, rows: Sequence[Any]) -> Iterator[FactEntry]:
        self.total = len(rows)
        return self.usable(rows, lambda row, where: self._article(row, form, where), file)

    def _article(self, row: Any, form: FieldMap, where: str) -> FactEntry:
        title = text_at(as_object(row), form["prompt"]).replace("_", " ")
        before, after = (text_at(row, form[name]) for name in ("previous", "target"))
        must_differ(after, before, (form["target"], form["previous"]))
        self.take(normalize(title), "the same title")
        return FactEntry(
            source=where,
            prompt=f"What does the article about {title} say?",
            target=self._one_line(after),
            previous=self._one_line(before),
            subject=title,
            relation="article",
            held_out=(f"Write the article about {title}.",),
            train=(f"Tell me what is known about {title}.",),
        )


@STREAMS.register("docmedit-yearly")
class DocMEdit(Documents):
    """Each edit brings the article about one entity up to date. Raises `BadStream` where the files cannot be used.

    Articles are known before their edits, so that old answers are beliefs and train edits exist; an article has one update alone, and
    is not revised.
    """

    summary = "DocMEdit: articles before and after an update of several facts (needs --data-root)"
    licence = "DocMEdit (Findings of ACL 2025): no licence file, for development and measurement only; articles of Wikipedia"
    size = "37,990 articles with 105,652 facts"
    title = "DocMEdit"
    reader = ArticleReader
    paths = ("docmedit/final_inputlabels1_100_sro_p.jsonl", "docmedit/docmedit.jsonl", "docmedit/docmedit.json")
    form = {"prompt": "title", "target": "normalized_targets", "previous": "normalized_inputs"}

    def train_pool(self) -> TrainPool:
        """The train part as running text, as questions, and as edits."""
        return replace(EntryStream.train_pool(self), texts=super().train_pool().texts)
