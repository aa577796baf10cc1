"""zsRE, CounterFact and KnowEdit files, in the layouts that people have: where they lie, what a record gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from streams.base import Skipped, StreamConfig
from streams.files.entry import EntryData, EntryQuestion, FactEntry, with_roles
from streams.files.fields import (
    FieldMap,
    answers,
    as_object,
    choose_form,
    find_parts,
    first_file,
    must_differ,
    nested,
    one,
    pick,
    read_rows,
    require_entries,
    take,
    text_pairs,
    usable,
)
from streams.files.records import BadField, distinct, plain, text_of
from streams.files.subjects import subjects
from streams.transforms import share
from testbed.core.events import content_id


@dataclass(frozen=True)
class Source:
    """One set: its files (every part that is found is read), the layouts of a record, a file of questions beside it.

    `further`: where another set may lie whose records of the same question and target lend their portability, and
    its fields.
    """

    name: str
    parts: tuple[tuple[str, ...], ...]
    forms: Mapping[str, FieldMap]
    queries: str = ""
    further: tuple[tuple[str, ...], FieldMap] | None = None


def load(source: Source, config: StreamConfig) -> EntryData:
    """Read the set under the data root. Raises `BadStream`."""
    reader = TextReader()
    digests, total, borrowed = [], 0, ""
    files = find_parts(config.data_root, source.parts, source.name)
    for path in files:
        rows, digest = read_rows(path, reader.skipped)
        digests.append((path.name, digest))
        total += len(rows)
        if rows:
            form = choose_form(next((r for r in rows if isinstance(r, Mapping)), rows[0]), source.forms, str(path))
            reader.read(path.name, form, rows)
        queries = path.parent / source.queries
        if queries.is_file():
            questions, digest = read_rows(queries, reader.skipped)
            digests.append((queries.name, digest))
            reader.add_queries(queries.name, questions, rows)
    if source.further and (path := first_file(config.data_root, source.further[0])):
        lent, digest = read_rows(path, reader.skipped)
        digests.append((path.name, digest))
        borrowed = reader.add_further(path.name, lent, source.further[1])
    require_entries(reader.entries, total, str(files[0]), reader.skipped)
    names = " and ".join(p.name for p in files)
    origin = f"{source.name} files {names} ({len(reader.entries):,} usable of {total:,} records{borrowed})"
    return EntryData(origin, with_roles(reader.entries), tuple(reader.skipped), content_id(digests))


@dataclass
class TextReader:
    """Turns rows into entries; what cannot be used is written to `skipped`."""

    entries: list[FactEntry] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    taken: set[object] = field(default_factory=set)

    def read(self, file: str, form: FieldMap, rows: Sequence[Any]) -> None:
        """Append the entries of one file. Where the form has no subject, it is found from the questions around it."""
        guesses = [None] * len(rows) if "subject" in form else _guess_subjects(rows, form)

        def entry(item: tuple[Any, tuple[str, str] | None], where: str) -> FactEntry:
            made = read_entry(as_object(item[0]), form, where, item[1])
            take(plain(made.prompt), self.taken, "the same prompt")
            if made.subject and made.previous:
                take((plain(made.subject), plain(made.previous)), self.taken, "the same subject with the same old answer")
            return made

        self.entries += usable(list(zip(rows, guesses)), entry, file, self.skipped)

    def add_queries(self, file: str, rows: Sequence[Any], records: Sequence[Any]) -> None:
        """Paraphrases and unrelated questions from a file of questions; a record without one is asked another's.

        Fields: edit_id, query, query_type (paraphrase, neighbor, naive), query_target.
        """
        position = {str(r.get("edit_id")): i for i, r in enumerate(records) if isinstance(r, Mapping)}
        held_out: dict[int, list[str]] = {}
        own: dict[int, EntryQuestion] = {}
        for at, kind, question in usable(rows, lambda row, _: _query(row, position), file, self.skipped):
            if kind == "paraphrase":
                held_out.setdefault(at, []).append(question.prompt)
            elif kind == "neighbor" and question.answer:
                own.setdefault(at, question)
        pool = list(own.values())
        self.entries = [_with_queries(e, held_out, own, pool) for e in self.entries]

    def add_further(self, file: str, rows: Sequence[Any], form: FieldMap) -> str:
        """Portability questions from another set's records with the same prompt and target; says how many have some."""
        lent: dict[tuple[str, str], list[EntryQuestion]] = {}

        def lend(row: Any, _: str) -> None:
            key = plain(one(as_object(row), form["prompt"])), plain(one(row, form["target"]))
            lent.setdefault(key, []).extend(nested(row, form["portability"], "portability"))

        list(usable(rows, lend, file, self.skipped))
        found = [lent.get((plain(e.prompt), plain(e.target)), []) for e in self.entries]
        self.entries = [replace(e, questions=(*e.questions, *more)) for e, more in zip(self.entries, found, strict=True)]
        return f"; portability of {sum(map(bool, found)):,} from {file}"


def _query(row: Any, position: Mapping[str, int]) -> tuple[int, str, EntryQuestion]:
    """The position of the record that a query is about, the query's type, and the query as a question."""
    edit_id = str(pick(as_object(row), "edit_id"))
    if edit_id not in position:
        raise BadField("edit_id names no record")
    answer, kind = next(iter(answers(row, "query_target")), None), text_of(row, "query_type")
    return position[edit_id], kind, EntryQuestion("locality_text", text_of(row, "query"), answer)


def _with_queries(
    e: FactEntry, held_out: Mapping[int, list[str]], own: Mapping[int, EntryQuestion], pool: Sequence[EntryQuestion]
) -> FactEntry:
    at = int(e.source.rpartition(" ")[2])
    unrelated = own.get(at) or (pool[int(share("unrelated", e.source) * len(pool))] if pool else None)
    questions = (*e.questions, unrelated) if unrelated else e.questions
    return replace(e, held_out=distinct((*e.held_out, *held_out.get(at, [])), [e.prompt]), questions=questions)


def _guess_subjects(rows: Sequence[Any], form: FieldMap) -> list[tuple[str, str] | None]:
    prompts = []
    for row in rows:
        try:
            prompts.append(one(row, form["prompt"]))
        except BadField:
            prompts.append("")
    return subjects(prompts)


def read_entry(row: Mapping[str, Any], form: FieldMap, name: str, guess: tuple[str, str] | None = None) -> FactEntry:
    """One row as an entry. Raises `BadField` for what cannot be used.

    guess: (subject, frame) found from the prompt, used where the form has no subject.
    """
    prompt, target = one(row, form["prompt"]), one(row, form["target"])
    said = answers(row, form.get("subject"))
    subject = said[0] if said else (guess[0] if guess else None)
    prompt = prompt.replace("{}", subject) if subject and "{}" in prompt else prompt
    before = answers(row, form.get("previous"))
    previous = before[0] if before else None
    if "previous" in form and previous is None:
        raise BadField(f"{form['previous']} is absent or empty")
    must_differ(target, previous, (form["target"], form.get("previous", "")))
    held_out = distinct([*answers(row, form.get("rephrase")), *answers(row, form.get("rephrase_too"))], [prompt])
    train = distinct(answers(row, form.get("train")), [prompt, *held_out])
    return FactEntry(
        source=name,
        prompt=prompt,
        target=target,
        previous=previous,
        subject=subject,
        relation=_relation(row, form, prompt, subject, guess),
        aliases=tuple(a for a in before[1:] if plain(a) != plain(target)),
        held_out=held_out,
        train=train,
        questions=tuple(_questions(row, form)),
    )


def _relation(row: Mapping[str, Any], form: FieldMap, prompt: str, subject: str | None, guess: tuple[str, str] | None) -> str:
    """The relation where the form has one, else the prompt with "{}" for its subject."""
    named = answers(row, form.get("relation"))
    if named:
        return named[0]
    if subject and subject in prompt:
        return guess[1] if guess and guess[0] == subject else prompt.replace(subject, "{}", 1)
    return "other"


def _questions(row: Mapping[str, Any], form: FieldMap) -> list[EntryQuestion]:
    return [
        *text_pairs(row, "locality_hard", form.get("hard"), form.get("hard_answer")),
        *text_pairs(row, "locality_text", form.get("text"), form.get("text_answer")),
        *nested(row, form.get("locality"), "locality_sibling"),
        *nested(row, form.get("portability"), "portability"),
    ]
