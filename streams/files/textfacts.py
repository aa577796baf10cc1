"""Text facts that papers compare on, on a yearly schedule: zsRE, CounterFact and KnowEdit, in the layouts that people have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

from streams.base import BadStream, StreamConfig
from streams.files.entry import EntryData, EntryQuestion, FactEntry, QuestionCollector
from streams.files.entry_stream import EntryStream
from streams.files.fields import SOURCES, FieldMap, RecordReader, as_object, columns, questions_at, read_entry
from streams.files.records import ABSENT, BadField, distinct, normalize, optional_text, text_at, value_at
from streams.files.subjects import subjects
from streams.files.tables import find_parts, first_file
from streams.transforms import hash_fraction
from testbed.core.events import content_id
from testbed.core.registry import STREAMS


def choose_form(row: object, forms: Mapping[str, FieldMap], where: str) -> FieldMap:
    """The first form whose prompt and target the row has. Raises `BadStream` with the columns that exist."""
    for form in forms.values():
        if all(value_at(row, form[f]) is not ABSENT for f in ("prompt", "target")):
            return form
    wanted = "; or ".join(f"{f['prompt']} and {f['target']}" for f in forms.values())
    raise BadStream(f"{where}: expected records with {wanted}; found {columns(row)}. Is this the right file?")


@dataclass
class TextReader(RecordReader):
    """Turns rows of text facts into entries."""

    entries: list[FactEntry] = field(default_factory=list)

    def read(self, file: str, form: FieldMap, rows: Sequence[Any]) -> None:
        """Append the entries of one file. Where the form has no subject, the subject is found by comparing all questions."""
        guesses = [None] * len(rows) if "subject" in form else guess_subjects(rows, form)

        def entry(item: tuple[Any, tuple[str, str] | None], where: str) -> FactEntry:
            made = read_entry(as_object(item[0]), form, where, self.notes, item[1])
            if made.previous is None:
                raise BadField(f"{form['previous']} is absent or empty")
            self.take(normalize(made.prompt), "the same prompt")
            if made.subject and made.previous:
                self.take((normalize(made.subject), normalize(made.previous)), "the same subject with the same old answer")
            return made

        self.entries += self.usable(list(zip(rows, guesses)), entry, file)

    def add_queries(self, file: str, rows: Sequence[Any], records: Sequence[Any]) -> None:
        """Add paraphrases and unrelated questions from a file; a record without an unrelated question gets another's.

        Fields: edit_id, query, query_type (paraphrase, neighbor, naive), query_target.
        """
        position = {str(r.get("edit_id")): i for i, r in enumerate(records) if isinstance(r, Mapping)}
        held_out: dict[int, list[str]] = {}
        own: dict[int, EntryQuestion] = {}
        for at, kind, question in self.usable(rows, lambda row, _: _query(row, position), file):
            if kind == "paraphrase":
                held_out.setdefault(at, []).append(question.prompt)
            elif kind == "neighbor" and question.answer:
                own.setdefault(at, question)
        pool = list(own.values())
        self.entries = [_with_queries(e, held_out, own, pool) for e in self.entries]

    def add_portability(self, file: str, rows: Sequence[Any], form: FieldMap) -> str:
        """Add the portability questions of another set's records with the same prompt and target; a note says how many have one."""
        by_fact: dict[tuple[str, str], list[EntryQuestion]] = {}

        def add(row: Any, _: str) -> None:
            key = normalize(text_at(as_object(row), form["prompt"])), normalize(text_at(row, form["target"]))
            by_fact.setdefault(key, []).extend(questions_at(row, form, "portability", self.notes))

        list(self.usable(rows, add, file))
        found = [by_fact.get((normalize(e.prompt), normalize(e.target)), []) for e in self.entries]
        self.entries = [replace(e, questions=(*e.questions, *more)) for e, more in zip(self.entries, found, strict=True)]
        return f"; portability of {sum(map(bool, found)):,} from {file}"


def _query(row: Any, position: Mapping[str, int]) -> tuple[int, str, EntryQuestion]:
    """The position of the record that a query is about, the query's type, and the query as a question."""
    edit_id = str(value_at(as_object(row), "edit_id"))
    if edit_id not in position:
        raise BadField("edit_id names no record")
    answer, kind = optional_text(row, "query_target"), text_at(row, "query_type")
    return position[edit_id], kind, EntryQuestion("locality_text", text_at(row, "query"), answer)


def _with_queries(
    e: FactEntry, held_out: Mapping[int, list[str]], own: Mapping[int, EntryQuestion], pool: Sequence[EntryQuestion]
) -> FactEntry:
    at = int(e.source.rpartition(" ")[2])
    unrelated = own.get(at) or (pool[int(hash_fraction("unrelated", e.source) * len(pool))] if pool else None)
    questions = (*e.questions, unrelated) if unrelated else e.questions
    return replace(e, held_out=distinct((*e.held_out, *held_out.get(at, [])), [e.prompt]), questions=questions)


def guess_subjects(rows: Sequence[Any], form: FieldMap) -> list[tuple[str, str] | None]:
    """For each row the subject and the frame of its prompt, found by comparing all prompts; None where no name is found."""
    prompts = []
    for row in rows:
        try:
            prompts.append(text_at(row, form["prompt"]))
        except BadField:
            prompts.append("")
    return subjects(prompts)


class TextFacts(EntryStream):
    """A set of text facts. Raises `BadStream` where its files cannot be used."""

    source: ClassVar[str]
    """Its name in `SOURCES`."""

    def read(self, config: StreamConfig) -> EntryData:
        """Read the set under the data root."""
        source, reader, note = SOURCES[self.source], TextReader(), ""
        files = find_parts(config.data_root, source["parts"], self.source)
        for path in files:
            rows = reader.rows(path)
            reader.total += len(rows)
            if rows:
                form = choose_form(next((r for r in rows if isinstance(r, Mapping)), rows[0]), source["forms"], str(path))
                reader.read(path.name, form, rows)
            queries = path.parent / source.get("queries", "")
            if queries.is_file():
                reader.add_queries(queries.name, reader.rows(queries), rows)
        lent = source.get("portability")
        if lent and (path := first_file(config.data_root, [lent["path"]])):
            note = reader.add_portability(path.name, reader.rows(path), lent["form"])
        title = f"{self.source} files {' and '.join(p.name for p in files)}"
        return reader.entry_data(reader.entries, title, str(files[0]), content_id(reader.digests), note)

    @cached_property
    def _old_answers(self) -> dict[str, set[str]]:
        """For each subject that is edited or trained on: its answers before the edit."""
        out: dict[str, set[str]] = {}
        for e in self._data.entries:
            if e.role != "probe" and e.subject and e.previous:
                out.setdefault(normalize(e.subject), set()).add(normalize(e.previous))
        return out

    def is_unaffected(self, collector: QuestionCollector, question: EntryQuestion) -> bool:
        """Besides, no prompt may name an edited subject where the answer is the one that the edit replaces."""
        if not super().is_unaffected(collector, question):
            return False
        words, answer = normalize(question.prompt).split(), normalize(question.answer or "")
        spans = (" ".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, min(i + 9, len(words) + 1)))
        return not any(answer in self._old_answers.get(span, ()) for span in spans)


for _source, _about in SOURCES.items():
    if "stream" in _about:
        _attributes = {"__module__": __name__, "source": _source, **{key: _about[key] for key in ("summary", "licence", "size")}}
        _attributes["compares"] = _about.get("compares", False)
        STREAMS.register(_about["stream"])(type(_source, (TextFacts,), _attributes))
