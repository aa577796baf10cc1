"""Documents on a yearly schedule: edits whose target is a whole paragraph, from UnKE and EditEvery."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from streams.base import StreamConfig, TrainPool
from streams.files.entry import EntryData, EntryQuestion, FactEntry, QuestionCollector, rotated
from streams.files.entry_stream import EntryStream
from streams.files.fields import FieldMap, RecordReader, as_object, read_entry
from streams.files.records import BadField, normalize, texts_in, value_at
from streams.files.tables import find_parts
from streams.files.textfacts import choose_form, guess_subjects
from testbed.core.events import EditEvent, Question, content_id
from testbed.core.registry import STREAMS


@dataclass
class DocumentReader(RecordReader):
    """Turns rows with a question and a document as its answer into entries. asked: how many rows ask each sub-question."""

    asked: Counter[str] = field(default_factory=Counter[str])

    def entries(self, file: str, form: FieldMap, rows: Sequence[Any]) -> Iterator[FactEntry]:
        """The entries of one file; a row that cannot be used is skipped and named. Subjects are sought where the form has no relation, of
        which a subject would have two documents."""
        self.total = len(rows)
        self.asked = Counter(normalize(q) for row in rows for q in _sub_questions(row, form))
        guesses = [None] * len(rows) if "relation" in form else guess_subjects(rows, form)

        def entry(item: tuple[Any, tuple[str, str] | None], where: str) -> FactEntry:
            made = read_entry(as_object(item[0]), form, where, self.notes, item[1])
            self.take(normalize(made.prompt), "the same prompt")
            held_out = tuple(p for p in made.held_out if self._fits(p != made.target, "a paraphrase is the document itself"))
            questions = tuple(self._sub_questions(item[0], form, made.prompt))
            return replace(made, target=self._one_line(made.target), held_out=held_out, questions=questions)

        return self.usable(list(zip(rows, guesses)), entry, file)

    def _one_line(self, text: str) -> str:
        """The text with a space for each line break, because a generation ends behind its first line."""
        line = " ".join(text.split())
        self._fits("\n" not in text, "a document of several lines is written in one")
        return line

    def _fits(self, good: bool, note: str) -> bool:
        if not good:
            self.notes[note] += 1
        return good

    def _sub_questions(self, row: Any, form: FieldMap, prompt: str) -> Iterator[EntryQuestion]:
        if "sub_question" not in form:
            return
        questions = texts_in(value_at(row, form["sub_question"]), form["sub_question"])
        answers = texts_in(value_at(row, form["sub_answer"]), form["sub_answer"])
        if len(questions) != len(answers):
            raise BadField(f"{form['sub_question']} holds {len(questions)} questions and {form['sub_answer']} {len(answers)} answers")
        for question, answer in zip(questions, answers):
            fits = self._fits(normalize(question) != normalize(prompt), "a sub-question is the edited question: not asked")
            fits = fits and self._fits(self.asked[normalize(question)] == 1, "a sub-question is asked by several records: not asked")
            if fits and self._fits(normalize(answer) not in normalize(question), "a sub-question contains its answer: not asked"):
                yield EntryQuestion("sub_question", question, answer)


def _sub_questions(row: Any, form: FieldMap) -> tuple[str, ...]:
    """The sub-questions of a row; none where the form has none. A row that holds something else has none that can be read."""
    if "sub_question" not in form or not isinstance(row, Mapping):
        return ()
    value = value_at(row, form["sub_question"])
    if not isinstance(value, (list, str)):
        return ()
    try:
        return texts_in(value, form["sub_question"])
    except BadField:
        return ()


class Documents(EntryStream):
    """Edits with long targets. Raises `BadStream` where the files cannot be used.

    The source does not say what was right before an edit. Nothing is therefore revised, reverted or retired, no question asks for
    the old answer, and locality is the question of a document that is never edited, against the unedited model's own answer.
    """

    supports = frozenset({"records", "development"})
    invents = False
    reader: ClassVar[type[DocumentReader]] = DocumentReader
    paths: ClassVar[tuple[str, ...]]
    """Where the file of the source may lie under the data root."""
    form: ClassVar[FieldMap]
    title: ClassVar[str]

    def __init__(self, config: StreamConfig) -> None:
        super().__init__(replace(config, revise=0.0, revert=0.0, retire=0.0, repeats=1))
        self._kept = tuple(e for e in self._data.entries if e.role == "probe" and e.key not in self._reserved)

    def read(self, config: StreamConfig) -> EntryData:
        path, reader = self._file(config.data_root), self.reader()
        rows = reader.rows(path)
        if rows:
            choose_form(next((r for r in rows if isinstance(r, Mapping)), rows[0]), {self.title: self.form}, str(path))
        entries = tuple(reader.entries(path.name, self.form, rows))
        return reader.entry_data(entries, f"{self.title} file {path.name}", str(path), content_id(reader.digests))

    def _file(self, root: Path | None) -> Path:
        return find_parts(root, [self.paths], self.name)[0]

    def _add_locality(self, collector: QuestionCollector, entry: FactEntry, own: list[EntryQuestion]) -> None:
        """Ask for a document that is never edited; the unedited model's own answer is the reference."""
        for other in rotated(self._kept, "far", entry.source)[:1]:
            collector.add_unreserved(EntryQuestion("locality_far", other.prompt, image=other.image))

    def general(self) -> tuple[Question, ...]:
        """The documents that are never edited, as running text; where the source has it, as it is before any edit."""
        return tuple(Question("text", e.previous or e.target, topic="documents") for e in self._kept)

    def train_pool(self) -> TrainPool:
        """The documents of the train part, as running text; the source has no old answers, of which train edits are made."""
        return TrainPool(texts=tuple(e.previous or e.target for e in self._data.entries if e.role == "train"))

    def notes(self, events: Sequence[EditEvent]) -> list[str]:
        words = sorted(len(e.target.split()) for e in events) or [0]
        length = f"documents of {words[0]} to {words[-1]} words, {words[len(words) // 2]} in the middle"
        return [*super().notes(events), f"{length}: free answers need as long a generation (--max-new-tokens)"]


@STREAMS.register("unke-yearly")
class Unke(Documents):
    """UnKE: a question about an entity, a false paragraph as its answer, and short questions about what the paragraph says."""

    summary = "UnKE: paragraphs about entities, with rephrased and sub-questions (needs --data-root)"
    licence = "UnKE (Deng et al.): no licence file, for development and measurement only"
    size = "1,000 paragraphs with 4,729 sub-questions"
    title = "UnKE"
    paths = ("unke/final_data_v2.json", "unke/final_data_v3.json")
    form = {
        "prompt": "question",
        "target": "answer",
        "rephrase": "para_question",
        "sub_question": "sub_question",
        "sub_answer": "sub_answer",
    }


@STREAMS.register("editevery-yearly")
class EditEvery(Documents):
    """EditEvery of AnyEdit: long answers of seven categories, such as derivations, code and poems."""

    summary = "EditEvery: long answers of mathematics, code, poetry, news, sciences (needs --data-root)"
    licence = "EditEvery (AnyEdit, Jiang et al.): no licence file, for development and measurement only"
    size = "552 answers in seven categories"
    title = "EditEvery"
    paths = ("editevery/editevery.json",)
    form = {"prompt": "question", "target": "answer", "relation": "category"}
