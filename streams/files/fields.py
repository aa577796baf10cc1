"""Read the records of any source as entries, through a map from our field names to the source's.

A map is a dictionary from our name ("prompt") to a path in the record ("requested_rewrite.prompt").
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from streams.base import BadStream, Skipped
from streams.data import table
from streams.files.entry import EntryData, EntryQuestion, FactEntry, with_roles
from streams.files.pictures import list_folder
from streams.files.records import (
    ABSENT,
    BadField,
    digest_of,
    distinct,
    kind_of,
    normalize,
    optional_text,
    parse_json,
    read_bytes,
    reasons,
    text_at,
    texts_at,
    texts_in,
    value_at,
)
from testbed.core.events import BadPicture, Split

R = TypeVar("R")
T = TypeVar("T")
FieldMap = Mapping[str, str]
SOURCES: dict[str, dict[str, Any]] = table(__file__, "sources.yaml")
"""For each data set where its files lie and what its fields are called; the file says what its entries mean."""


def nested_questions(record: object, path: str | None, split: Split) -> Iterator[EntryQuestion]:
    """`{"group": [{"prompt": ..., "ground_truth": ...}]}` as questions; the first answer counts, others are aliases.

    Raises `BadField` for another shape.
    """
    value = value_at(record, path) if path else ABSENT
    if value is ABSENT or value is None:
        return
    groups = value.values() if isinstance(value, Mapping) else [value]
    for rows in groups:
        for row in rows if isinstance(rows, (list, tuple)) else [rows]:
            if row is None:
                continue
            if not isinstance(row, Mapping):
                raise BadField(f"{path} must hold objects with prompt and ground_truth, found {kind_of(row)}")
            prompts = texts_in(row.get("prompt"), f"{path}.prompt")
            golds = distinct(texts_in(row.get("ground_truth"), f"{path}.ground_truth"))
            if prompts and (golds or split.startswith("locality_")):
                yield EntryQuestion(split, prompts[0], golds[0] if golds else None, aliases=golds[1:])


def must_differ(target: str, previous: str | None, names: tuple[str, str] = ("target", "previous")) -> None:
    """Raise `BadField` where an edit would change nothing."""
    if previous is not None and normalize(previous) == normalize(target):
        raise BadField(f"{names[0]} equals {names[1]}: the edit would change nothing")


def read_entry(row: Mapping[str, Any], form: FieldMap, name: str, guess: tuple[str, str] | None = None) -> FactEntry:
    """One row as an entry. Raises `BadField` where it cannot be used.

    Args:
        form: our field names to paths in the row.
        name: the entry's `source`.
        guess: (subject, frame) found from the prompt, used where the form has no subject.
    """
    prompt, target = text_at(row, form["prompt"]), text_at(row, form["target"])
    subject = optional_text(row, form.get("subject")) or (guess[0] if guess else None)
    prompt = prompt.replace("{}", subject) if subject and "{}" in prompt else prompt
    old = texts_at(row, form.get("previous"))
    previous = old[0] if old else None
    if "previous" in form and previous is None:
        raise BadField(f"{form['previous']} is absent or empty")
    must_differ(target, previous, (form["target"], form.get("previous", "")))
    held_out = distinct([*texts_at(row, form.get("rephrase")), *texts_at(row, form.get("rephrase_too"))], [prompt])
    train = distinct(texts_at(row, form.get("train")), [prompt, *held_out])
    return FactEntry(
        source=name,
        prompt=prompt,
        target=target,
        previous=previous,
        subject=subject,
        relation=relation_of(row, form, prompt, subject, guess),
        aliases=tuple(a for a in old[1:] if normalize(a) != normalize(target)),
        held_out=held_out,
        train=train,
        questions=tuple(questions_of(row, form)),
    )


def relation_of(row: Mapping[str, Any], form: FieldMap, prompt: str, subject: str | None, guess: tuple[str, str] | None) -> str:
    """The relation where the form has one, else the prompt with "{}" for its subject."""
    named = texts_at(row, form.get("relation"))
    if named:
        return named[0]
    if subject and subject in prompt:
        return guess[1] if guess and guess[0] == subject else prompt.replace(subject, "{}", 1)
    return "other"


def paired_questions(record: object, split: Split, prompts: str | None, golds: str | None) -> list[EntryQuestion]:
    """Questions from the prompts at one path and the answers at another.

    They are paired one by one where there are as many of both; else the first answer is that of all questions, and the
    others are its aliases.
    """
    if not prompts:
        return []
    texts, right = texts_in(value_at(record, prompts), prompts), texts_in(value_at(record, golds), golds) if golds else ()
    if len(texts) > 1 and len(texts) == len(right):
        return [EntryQuestion(split, q, a) for q, a in zip(texts, right)]
    return [EntryQuestion(split, q, right[0] if right else None, aliases=distinct(right[1:], right[:1])) for q in texts]


def questions_of(row: Mapping[str, Any], form: FieldMap) -> list[EntryQuestion]:
    return [
        *paired_questions(row, "locality_hard", form.get("hard"), form.get("hard_answer")),
        *paired_questions(row, "locality_text", form.get("text"), form.get("text_answer")),
        *nested_questions(row, form.get("locality"), "locality_sibling"),
        *nested_questions(row, form.get("portability"), "portability"),
    ]


def columns(row: object) -> str:
    """The fields of a row, for an error message."""
    if not isinstance(row, Mapping):
        return kind_of(row)
    return "the fields " + (_shortened([str(k) for k in row], 30) or "none")


def as_object(row: Any) -> Mapping[str, Any]:
    """The row, if it is a JSON object. Raises `BadField` otherwise."""
    if not isinstance(row, Mapping):
        raise BadField(f"expected an object, found {kind_of(row)}")
    return row


def read_rows(path: Path, skipped: list[Skipped]) -> tuple[list[Any], str]:
    """The records of a JSON list, of an object with one list in it, or of JSON lines, and the SHA-256 of the file.

    A line that cannot be read is skipped and named; trouble with a whole JSON file raises `BadStream`.
    """
    raw = read_bytes(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return list(_lines(raw, path.name, skipped)), digest_of(raw)
    top = parse_json(raw, path)
    if isinstance(top, Mapping):
        lists = [v for v in top.values() if isinstance(v, list) and v and isinstance(v[0], Mapping)]
        top = lists[0] if len(lists) == 1 else top
    if not isinstance(top, list):
        raise BadStream(f"{path}: expected a list of records, found {kind_of(top)}. Is this the right file?")
    return top, digest_of(raw)


def _lines(raw: bytes, name: str, skipped: list[Skipped]) -> Iterator[Any]:
    for number, line in enumerate(raw.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as e:
            skipped.append(Skipped(f"{name} line {number}", f"not UTF-8 (byte {e.start} of the line): save the file as UTF-8"))
        except (ValueError, RecursionError):
            skipped.append(Skipped(f"{name} line {number}", "not valid JSON: the line may have been cut short"))


def find_files(root: Path | None, paths: Sequence[str], stream: str) -> list[Path]:
    """The files under the data root that fit the first path with a file; the root itself where it is a file.

    Paths may hold wildcards, and each may begin at any of its folders. Raises `BadStream` that names what was expected and
    what was found.
    """
    expected = " or ".join(patterns := suffixes(paths))
    if root is None:
        raise BadStream(f"{stream} reads files: give their folder as --data-root (expected {expected}).")
    root = Path(root)
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise BadStream(f"data root {root} is not a folder. {stream} expects {expected} in it.")
    for pattern in patterns:
        if found := sorted(p for p in root.glob(pattern) if p.is_file()):
            return found
    if below := sorted({str(p.parent) for pattern in patterns if "/" not in pattern for p in root.glob(f"*/{pattern}")}):
        raise BadStream(f"{root} is one level too high. Give as data root {' or '.join(below)}.")
    raise BadStream(f"{root} has not the files of {stream}. Expected {expected}; found {listing(root)}.")


def find_parts(root: Path | None, parts: Sequence[Sequence[str]], stream: str) -> list[Path]:
    """For each part of a set the first of its paths that is a file under the data root; parts without a file are left out.

    Raises `BadStream`, as `find_files`, where no part has a file.
    """
    return [p for part in parts if (p := first_file(root, part))] or find_files(root, [p for part in parts for p in part], stream)


def suffixes(paths: Iterable[str]) -> list[str]:
    """Each path from its last folder on, from the one above, and so on: the user may give any of them as the data root."""
    split = [path.split("/") for path in paths]
    return ["/".join(steps[i:]) for steps in split for i in reversed(range(len(steps)))]


def first_file(root: Path | None, paths: Sequence[str]) -> Path | None:
    """The first of the paths that is a file under the data root; each may begin at any of its folders."""
    return next((Path(root) / name for name in suffixes(paths) if (Path(root) / name).is_file()), None) if root else None


def listing(folder: Path) -> str:
    """The first names in a folder, for an error message."""
    return _shortened([e.name for e in list_folder(folder)], 8) or "nothing"


def _shortened(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@dataclass
class RecordReader:
    """Turns the records of one source into what a stream needs; a record that cannot be used is named in `skipped`.

    `digests` are hashes of the files, `total` counts the records, and `taken` holds what only one record may have.
    """

    skipped: list[Skipped] = field(default_factory=list)
    digests: list[object] = field(default_factory=list)
    total: int = 0
    taken: set[object] = field(default_factory=set)

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
        return EntryData(origin, with_roles(entries), tuple(self.skipped), digest)
