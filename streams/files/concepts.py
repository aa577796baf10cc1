"""ConceptEdit on a yearly schedule: definitions of concepts, and the question whether an instance belongs to one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streams.base import BadStream
from streams.files.documents import DocumentReader, Documents
from streams.files.entry import EntryQuestion, FactEntry, QuestionCollector
from streams.files.fields import FieldMap, as_object, read_entry
from streams.files.records import BadField, normalize, span_of, text_at, texts_at
from streams.files.tables import find_files, shortened
from testbed.core.registry import STREAMS

DEMONSTRATIONS = "Whether a robin belongs to category bird? Yes\nWhether a hammer belongs to category bird? No\n"
"""Two answered questions, which show the form of the answer."""
INSTANCES = "instance_prompt"
"""The field with the question whether an instance belongs to the concept, or with several of them."""


def membership(instance: str, concept: str) -> str:
    """The question whether an instance belongs to a concept, behind two answered ones.

    Source of the form: Wang et al. 2024 (ConceptEdit, arXiv 2403.06259), whose demonstrations are others.
    """
    return f"{DEMONSTRATIONS}Whether {instance} belongs to category {concept}?"


@dataclass
class ConceptReader(DocumentReader):
    """Turns rows with a concept, the definition that it gets, and instances into entries."""

    def entries(self, file: str, form: FieldMap, rows: Sequence[Any]) -> Iterator[FactEntry]:
        self.total = len(rows)
        return self.usable(rows, lambda row, where: self._concept(row, form, where), file)

    def _concept(self, row: Any, form: FieldMap, where: str) -> FactEntry:
        concept, made = text_at(as_object(row), form["subject"]), read_entry(row, form, where, self.notes)
        named = [p for p in texts_at(row, INSTANCES) if self._fits(span_of(p, concept) is not None, f"{INSTANCES} names another concept")]
        if not named:
            raise BadField(f"{INSTANCES} asks about no instance of {form['subject']}: without one nothing shows whether instances follow")
        self.take(normalize(made.prompt), "the same prompt")
        instances = (EntryQuestion("instance_follow", DEMONSTRATIONS + prompt, "No") for prompt in named)
        return replace(made, target=self._one_line(made.target), questions=(*made.questions, *instances))


@STREAMS.register("conceptedit-yearly")
class ConceptEdit(Documents):
    """Each edit gives a concept the definition of another one, so that its instances must leave it.

    Raises `BadStream` where the files cannot be used, or where several lie together.
    """

    summary = "ConceptEdit: a concept gets another one's definition, which its instances follow (needs --data-root)"
    licence = "ConceptEdit (Wang et al.): CC BY-NC-SA 4.0"
    size = "452 concepts with 8,767 instances"
    title = "ConceptEdit"
    reader = ConceptReader
    paths = ("conceptedit/final_*_int*.json",)
    form = {
        "prompt": "prompt",
        "target": "target_new_desc",
        "rephrase": "phrase_prompt",
        "subject": "label",
        "hard": "locality_prompt",
        "hard_answer": "locality_answer",
    }

    def _file(self, root: Path | None) -> Path:
        files = find_files(root, self.paths, self.name)
        if len(files) > 1:
            offered = shortened([p.name for p in files], 8)
            raise BadStream(f"{root} holds {offered}, each made for one model and one kind of edit: give one file as --data-root")
        return files[0]

    def _add_locality(self, collector: QuestionCollector, entry: FactEntry, own: list[EntryQuestion]) -> None:
        """Besides a definition that is never edited, ask the questions that the record brings."""
        super()._add_locality(collector, entry, own)
        for question in filter(lambda q: self.is_unaffected(collector, q), own):
            collector.add_unreserved(question)
