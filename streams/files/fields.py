"""Read the records of any source as entries, through a map from our field names to the source's.

A map is a dictionary from our name ("prompt") to a path in the record ("requested_rewrite.prompt").
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from streams.base import BadStream, Skipped
from streams.data import table
from streams.files.entry import EntryData, EntryQuestion, FactEntry, with_roles
from streams.files.records import (
    ABSENT,
    BadField,
    distinct,
    kind_of,
    normalize,
    optional_text,
    reasons,
    span_of,
    text_at,
    texts_at,
    texts_in,
    value_at,
)
from streams.files.tables import read_rows, shortened
from testbed.core.events import BadPicture, Split

R = TypeVar("R")
T = TypeVar("T")
FieldMap = Mapping[str, str]
Notes = Counter[str]
"""What was read differently than it is written, or not read, by description, with the number of times."""
QUESTIONS: dict[str, Split] = {
    "hard": "locality_hard",
    "text": "locality_text",
    "locality": "locality_sibling",
    "portability": "portability",
}
"""Our fields that hold questions, and the split of each."""
PROMPTS = ("prompt", "question", "Question", "query", "port_q", "loc")
ANSWERS = ("ground_truth", "answer", "Answer", "port_a", "loc_ans")
GROUPS: dict[str, Split] = {"loc": "locality_text", "neighborhood": "locality_hard", "distracting": "locality_hard"}
"""Names of a sub-field or of a group of questions that say their split."""
SOURCES: dict[str, dict[str, Any]] = table(__file__, "sources.yaml")
"""For each data set where its files lie and what its fields are called; the file says what its entries mean."""


def questions_at(row: object, form: FieldMap, name: str, notes: Notes) -> list[EntryQuestion]:
    """The questions of one of our fields (see `QUESTIONS`), with the answers of `{name}_answer` where they bring none.

    Accepts texts, lists of them, and any nesting of objects that hold a question and its answers under one of the names in
    `PROMPTS` and `ANSWERS`. What is passed over is counted in `notes`. Raises `BadField` for anything else.
    """
    path = form.get(name, "")
    value = value_at(row, path) if path else ABSENT
    if isinstance(value, str) and value[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            value = json.loads(value)
    answers = value_at(row, form[f"{name}_answer"]) if f"{name}_answer" in form else ABSENT
    return list(_nested(value, answers, path, QUESTIONS[name], notes))


def _nested(value: object, answers: object, path: str, split: Split, notes: Notes) -> Iterator[EntryQuestion]:
    if isinstance(value, Mapping):
        prompt, answer = (next((k for k in names if k in value), None) for names in (PROMPTS, ANSWERS))
        rest = {str(k): v for k, v in value.items() if k not in (prompt, answer) and v not in (None, "", [], {})}
        inner = {k: v for k, v in rest.items() if prompt is None and isinstance(v, (Mapping, list, tuple))}
        if rest and prompt is None and not inner:
            raise BadField(f"{path} holds {', '.join(rest)}: expected a question ({', '.join(PROMPTS)}) and {', '.join(ANSWERS)}")
        for k in rest.keys() - inner.keys():
            notes[f"{path}: the sub-field {k} is not read"] += 1
        if prompt is not None:
            own = value[answer] if answer is not None else answers
            yield from _paired(value[prompt], own, f"{path}.{prompt}", GROUPS.get(prompt, split), notes)
        for k, v in inner.items():
            yield from _nested(v, answers, path, GROUPS.get(k.casefold(), split), notes)
    elif isinstance(value, (list, tuple)) and any(isinstance(v, (Mapping, list, tuple)) for v in value):
        for v in value:
            yield from _nested(v, answers, path, split, notes)
    else:
        yield from _paired(value, answers, path, split, notes)


def _paired(prompts: object, answers: object, path: str, split: Split, notes: Notes) -> Iterator[EntryQuestion]:
    """Questions from prompts and answers: one by one where there are as many of both; else all answers hold for all prompts."""
    texts, listed = texts_in(prompts, path), list(answers) if isinstance(answers, (list, tuple)) else [answers]
    one_by_one = len(texts) == len(listed) > 1
    if 1 < len(listed) != len(texts) > 1:
        notes[f"{path}: prompts and answers differ in number, so each prompt has all answers"] += 1
    for i, text in enumerate(texts):
        golds = distinct(texts_in(listed[i] if one_by_one else answers, f"the answer of {path}"))
        if golds or split.startswith("locality_"):
            yield EntryQuestion(split, text, golds[0] if golds else None, aliases=golds[1:])
        else:
            notes[f"{path}: a question without an answer is not asked"] += 1


def generation_prompts(row: object, form: FieldMap, target: str) -> tuple[EntryQuestion, ...]:
    """The prompts from which a model is to go on. The id of the target, where the source has one, is an alias of the value: it
    names the texts with which the model's are compared (`analysis.metrics.reference_score`)."""
    known = texts_at(row, form.get("target_id"))[:1]
    prompts = distinct(texts_at(row, form.get("generation")))
    return tuple(EntryQuestion("generation", prompt, aliases=tuple(known), of_value=target) for prompt in prompts)


def must_differ(target: str, previous: str | None, names: tuple[str, str] = ("target", "previous")) -> None:
    """Raise `BadField` where an edit would change nothing."""
    if previous is not None and normalize(previous) == normalize(target):
        raise BadField(f"{names[0]} equals {names[1]}: the edit would change nothing")


def read_entry(row: Mapping[str, Any], form: FieldMap, name: str, notes: Notes, guess: tuple[str, str] | None = None) -> FactEntry:
    """One row as an entry. Raises `BadField` where it cannot be used.

    Args:
        form: our field names to paths in the row.
        name: the entry's `source`.
        notes: counts what was passed over or changed, by description.
        guess: (subject, frame) found from the prompt, used where the form has no subject.
    """
    prompt, target = text_at(row, form["prompt"]), text_at(row, form["target"])
    subject = optional_text(row, form.get("subject")) or (guess[0] if guess else None)
    prompt = prompt.replace("{}", subject) if subject and "{}" in prompt else prompt
    if subject and subject not in prompt:
        span = span_of(prompt, subject)
        notes[f"the subject is {'in its prompt in another case or Unicode form' if span else 'not in its prompt'}"] += 1
        subject = span or subject
    old = texts_at(row, form.get("previous"))
    if not old and "previous" in form and value_at(row, form["previous"]) not in (ABSENT, None, "", [], ()):
        notes[f"{form['previous']} holds NaN, a blank or a special token: no old answer"] += 1
    must_differ(target, old[0] if old else None, (form["target"], form.get("previous", "")))
    held_out = distinct([*texts_at(row, form.get("rephrase")), *texts_at(row, form.get("rephrase_too"))], [prompt])
    return FactEntry(
        source=name,
        prompt=prompt,
        target=target,
        previous=old[0] if old else None,
        subject=subject,
        relation=_relation(row, form, prompt, subject, guess),
        aliases=tuple(a for a in old[1:] if normalize(a) != normalize(target)),
        held_out=held_out,
        train=distinct(texts_at(row, form.get("train")), [prompt, *held_out]),
        questions=(
            *(q for field in QUESTIONS for q in questions_at(row, form, field, notes)),
            *generation_prompts(row, form, target),
        ),
    )


def _relation(row: Mapping[str, Any], form: FieldMap, prompt: str, subject: str | None, guess: tuple[str, str] | None) -> str:
    """The relation where the form has one, else the prompt with "{}" for its subject."""
    if named := optional_text(row, form.get("relation")):
        return named
    if subject and subject in prompt:
        return guess[1] if guess and guess[0] == subject else prompt.replace(subject, "{}", 1)
    return "other"


def columns(row: object) -> str:
    """The fields of a row, for an error message."""
    if not isinstance(row, Mapping):
        return kind_of(row)
    return "the fields " + (shortened([str(k) for k in row], 30) or "none")


def as_object(row: Any) -> Mapping[str, Any]:
    """The row, if it is a JSON object. Raises `BadField` otherwise."""
    if not isinstance(row, Mapping):
        raise BadField(f"expected an object, found {kind_of(row)}")
    return row


@dataclass
class RecordReader:
    """Turns the records of one source into what a stream needs; a record that cannot be used is named in `skipped`.

    `digests` are hashes of the files, `total` counts the records, `taken` holds what only one record may have, and `notes`
    counts what was passed over within records.
    """

    skipped: list[Skipped] = field(default_factory=list)
    digests: list[object] = field(default_factory=list)
    total: int = 0
    taken: set[object] = field(default_factory=set)
    notes: Notes = field(default_factory=Counter)

    def rows(self, path: Path) -> list[Any]:
        """The records of a file as `read_rows` gives them; its name and hash are kept."""
        rows, digest = read_rows(path, self.skipped)
        self.digests.append((path.name, digest))
        return rows

    def usable(self, rows: Iterable[R], make: Callable[[R, str], T], where: Callable[[int, R], str] | str) -> Iterator[T]:
        """What `make(row, name)` gives for each row; a row for which it raises `BadField` or `BadPicture` is skipped.

        Args:
            where: the name of a row from its position and itself; a text stands for "{text} record {position}".
        """
        for i, row in enumerate(rows):
            name = f"{where} record {i}" if isinstance(where, str) else where(i, row)
            try:
                yield make(row, name)
            except (BadField, BadPicture) as e:
                self.skip(name, str(e))

    def skip(self, where: str, reason: str) -> None:
        self.skipped.append(Skipped(where, reason))

    def take(self, key: object, what: str) -> None:
        """Add a key to those taken. Raises `BadField` where it stands in an earlier record."""
        if key in self.taken:
            raise BadField(f"{what} stands in an earlier record")
        self.taken.add(key)

    def require(self, entries: Sequence[FactEntry], where: str, hint: str = "") -> None:
        """Raise `BadStream`, with the commonest reasons, where no record can be used."""
        if not entries:
            why = reasons(self.skipped) or "the file is empty"
            raise BadStream(f"{where}: none of {self.total:,} records can be used ({why}).{hint}")

    def entry_data(self, entries: Sequence[FactEntry], title: str, where: str, digest: str, note: str = "") -> EntryData:
        """The entries, each with its role, as what a loader returns. Raises `BadStream` where there is none."""
        self.require(entries, where)
        origin = f"{title} ({len(entries):,} usable of {self.total:,} records{note})"
        return EntryData(origin, with_roles(entries), tuple(self.skipped), digest, notes=self.notes)
