"""zsRE, CounterFact and KnowEdit files, in the layouts that people have: where they lie, what a record gives."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streams.base import Skipped, StreamConfig
from streams.files.entry import Data, EntryQuestion, FactEntry, with_roles
from streams.files.fields import (
    FieldMap,
    Once,
    answers,
    choose_form,
    columns,
    find,
    must_differ,
    nested,
    none_left,
    one,
    pick,
    read_rows,
    text_pairs,
)
from streams.files.records import BadField, distinct, kind_of, plain, reasons, text_of
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


def load(source: Source, config: StreamConfig) -> Data:
    """Read the set under the data root. Raises `BadStream`."""
    reader = TextReader()
    digests, total, borrowed = [], 0, ""
    files = _files(source, config.data_root)
    for path in files:
        rows, raw = read_rows(path, reader.skipped)
        digests.append((path.name, hashlib.sha256(raw).hexdigest()))
        total += len(rows)
        if rows:
            name, form = choose_form(next((r for r in rows if isinstance(r, Mapping)), rows[0]), source.forms, str(path))
            reader.read(path.name, name, form, rows)
        queries = path.parent / source.queries
        if queries.is_file():
            asked, raw = read_rows(queries, reader.skipped)
            digests.append((queries.name, hashlib.sha256(raw).hexdigest()))
            reader.add_queries(queries.name, asked, rows)
    if source.further and (path := _first(config.data_root, source.further[0])):
        lent, raw = read_rows(path, reader.skipped)
        digests.append((path.name, hashlib.sha256(raw).hexdigest()))
        borrowed = reader.add_further(path.name, lent, source.further[1])
    none_left(reader.entries, total, str(files[0]), reasons(reader.skipped))
    names = " and ".join(p.name for p in files)
    origin = f"{source.name} files {names} ({len(reader.entries):,} usable of {total:,} records{borrowed})"
    return Data(origin, with_roles(reader.entries), tuple(reader.skipped), content_id(digests))


def _files(source: Source, root: Path | None) -> list[Path]:
    if root is None or not Path(root).is_dir():
        return find(root, [p for part in source.parts for p in part], source.name)
    found = [_first(root, part) for part in source.parts]
    return [p for p in found if p] or find(root, [p for part in source.parts for p in part], source.name)


def _first(root: Path | None, names: Sequence[str]) -> Path | None:
    return next((Path(root) / name for name in names if (Path(root) / name).is_file()), None) if root else None


@dataclass
class TextReader:
    """Turns rows into entries; what cannot be used is written to `skipped`."""

    entries: list[FactEntry] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    _once: Once = field(default_factory=Once)

    def read(self, file: str, form_name: str, form: FieldMap, rows: Sequence[Any]) -> None:
        """Append the entries of one file. Where the form has no subject, it is found from the questions around it."""
        found = iter(_found_subjects(rows, form) if "subject" not in form else ())
        for i, row in enumerate(rows):
            where, guess = f"{file} record {i}", next(found, None)
            try:
                if not isinstance(row, Mapping):
                    raise BadField(f"expected an object, found {kind_of(row)}")
                entry = read_entry(row, form, where, guess)
                self._once.take(plain(entry.prompt), "the same prompt")
                if entry.subject and entry.previous:
                    self._once.take((plain(entry.subject), plain(entry.previous)), "the same subject with the same old answer")
                self.entries.append(entry)
            except BadField as e:
                self.skipped.append(Skipped(where, str(e)))

    def add_queries(self, file: str, rows: Sequence[Any], records: Sequence[Any]) -> None:
        """Paraphrases and unrelated questions from a file of questions; a record without one is asked another's.

        Fields: edit_id, query, query_type (paraphrase, neighbor, naive), query_target.
        """
        place = {str(r.get("edit_id")): i for i, r in enumerate(records) if isinstance(r, Mapping)}
        held_out: dict[int, list[str]] = {}
        own: dict[int, EntryQuestion] = {}
        for i, row in enumerate(rows):
            try:
                at, kind, ask = _query(row, place)
            except BadField as e:
                self.skipped.append(Skipped(f"{file} record {i}", str(e)))
                continue
            if kind == "paraphrase":
                held_out.setdefault(at, []).append(ask.prompt)
            elif kind == "neighbor" and ask.answer:
                own.setdefault(at, ask)
        pool = list(own.values())
        self.entries = [_with_queries(e, held_out, own, pool) for e in self.entries]

    def add_further(self, file: str, rows: Sequence[Any], form: FieldMap) -> str:
        """Portability questions from another set's records with the same prompt and target; says how many have some."""
        lent: dict[tuple[str, str], list[EntryQuestion]] = {}
        for i, row in enumerate(rows):
            try:
                if not isinstance(row, Mapping):
                    raise BadField(f"expected an object, found {kind_of(row)}")
                key = plain(one(row, form["prompt"])), plain(one(row, form["target"]))
                lent.setdefault(key, []).extend(nested(row, form["portability"], "portability"))
            except BadField as e:
                self.skipped.append(Skipped(f"{file} record {i}", str(e)))
        found = [lent.get((plain(e.prompt), plain(e.target)), []) for e in self.entries]
        self.entries = [replace(e, asks=(*e.asks, *asks)) for e, asks in zip(self.entries, found, strict=True)]
        return f"; portability of {sum(map(bool, found)):,} from {file}"


def _query(row: object, place: Mapping[str, int]) -> tuple[int, str, EntryQuestion]:
    if not isinstance(row, Mapping):
        raise BadField(f"expected an object, found {kind_of(row)}")
    edit_id = str(pick(row, "edit_id"))
    if edit_id not in place:
        raise BadField("edit_id names no record")
    answer = answers(row, "query_target")
    return place[edit_id], text_of(row, "query_type"), EntryQuestion("locality_text", text_of(row, "query"), answer[0] if answer else None)


def _with_queries(
    e: FactEntry, held_out: Mapping[int, list[str]], own: Mapping[int, EntryQuestion], pool: Sequence[EntryQuestion]
) -> FactEntry:
    at = int(e.name.rpartition(" ")[2])
    unrelated = own.get(at) or (pool[int(share("unrelated", e.name) * len(pool))] if pool else None)
    asks = (*e.asks, unrelated) if unrelated else e.asks
    return replace(e, held_out=distinct((*e.held_out, *held_out.get(at, [])), [e.prompt]), asks=asks)


def _found_subjects(rows: Sequence[Any], form: FieldMap) -> list[tuple[str, str] | None]:
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
        name=name,
        prompt=prompt,
        target=target,
        previous=previous,
        subject=subject,
        category=_category(row, form, prompt, subject, guess),
        aliases=tuple(a for a in before[1:] if plain(a) != plain(target)),
        held_out=held_out,
        train=train,
        asks=tuple(_asks(row, form)),
    )


def _category(row: Mapping[str, Any], form: FieldMap, prompt: str, subject: str | None, guess: tuple[str, str] | None) -> str:
    """The relation where the form has one, else the prompt with "{}" for its subject."""
    named = answers(row, form.get("relation"))
    if named:
        return named[0]
    if subject and subject in prompt:
        return guess[1] if guess and guess[0] == subject else prompt.replace(subject, "{}", 1)
    return "other"


def _asks(row: Mapping[str, Any], form: FieldMap) -> list[EntryQuestion]:
    return [
        *text_pairs(row, "locality_hard", form.get("hard"), form.get("hard_answer")),
        *text_pairs(row, "locality_text", form.get("text"), form.get("text_answer")),
        *nested(row, form.get("locality"), "locality_sibling"),
        *nested(row, form.get("portability"), "portability"),
    ]


def known_columns(rows: Sequence[Any]) -> str:
    """The fields of the first record, for a message."""
    return columns(next((r for r in rows if isinstance(r, Mapping)), None)) if rows else "no records"
