"""Read the bytes, the values and the texts of published data sets, which hold mistakes.

A file that cannot be read raises `BadStream`. A record that cannot be used raises `BadField`, which a loader turns into
a `Skipped` record, so that one bad record never costs the others.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any

from streams.base import BadStream, Skipped

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))
_SPECIAL_TOKENS = re.compile(r"(<\|[^<>|]*\|>|</?s>|<(pad|unk|bos|eos|mask|(start|end)_of_turn)>|\[(PAD|UNK|CLS|SEP|MASK|BOS|EOS)\])+")
ABSENT = object()


class BadField(ValueError):
    """One field of one record cannot be used; the message is the reason shown for the skipped record."""


@lru_cache(maxsize=1 << 16)
def normalize(text: str) -> str:
    """The text without case, punctuation, English articles and extra space; answers count as equal where this is equal."""
    base = unicodedata.normalize("NFKC", text).casefold().strip()
    return " ".join(_ARTICLES.sub(" ", base.translate(_PUNCTUATION)).split()) or base


def distinct(texts: Iterable[str], taken: Iterable[str] = ()) -> tuple[str, ...]:
    """The texts in order, without those that equal an earlier one or one of `taken` after `normalize`."""
    seen = {normalize(t) for t in taken}
    out = []
    for text in texts:
        bare = normalize(text)
        if bare not in seen:
            seen.add(bare)
            out.append(text)
    return tuple(out)


def read_bytes(path: Path) -> bytes:
    """The file's content. Raises `BadStream` when it is absent, a folder or unreadable."""
    try:
        return path.read_bytes()
    except FileNotFoundError as e:
        raise BadStream(f"{path} is absent. Download it, or leave out --data-root to use the simulated world.") from e
    except IsADirectoryError as e:
        raise BadStream(f"{path} is a folder, expected a JSON file.") from e
    except OSError as e:
        raise BadStream(f"{path} cannot be read: {e.strerror or e}. Check its permissions and the disk.") from e


def digest_of(raw: bytes) -> str:
    """SHA-256 of a file's bytes, in hex digits."""
    return hashlib.sha256(raw).hexdigest()


def parse_json(raw: bytes, path: Path) -> Any:
    """The JSON value in `raw` (UTF-8, a byte-order mark is allowed). Raises `BadStream` with line and byte."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        found = f"0x{raw[e.start]:02x} at byte {e.start}"
        raise BadStream(f"{path}: expected UTF-8 text, found {found}. Save the file as UTF-8.") from e
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        at = len(text[: e.pos].encode())
        raise BadStream(
            f"{path}: not valid JSON at line {e.lineno}, column {e.colno} (byte {at} of {len(raw)}): {e.msg}. "
            "The file may have been cut short: download it again."
        ) from e
    except (RecursionError, ValueError) as e:
        raise BadStream(f"{path}: JSON that cannot be read: {e}. Expected records, not deep nesting or huge numbers.") from e


def read_table(path: Path, field: str) -> tuple[dict[str, Any], list[Any], str]:
    """A JSON object with a list under `field`: (the object, that list, the file's SHA-256). Raises `BadStream`."""
    raw = read_bytes(path)
    top = parse_json(raw, path)
    if not isinstance(top, dict):
        raise BadStream(f"{path}: expected an object with a list under {field!r} at the top, found {kind_of(top)}. Is this the right file?")
    rows = top.get(field)
    if not isinstance(rows, list):
        found = f"found {kind_of(rows)}" if field in top else f"found the fields {', '.join(map(repr, list(top)[:8])) or 'none'}"
        raise BadStream(f"{path}: expected a list under {field!r}, {found}. Is this the right file?")
    return top, rows, digest_of(raw)


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def clean(value: object, field: str) -> str:
    """The text with HTML entities resolved and stripped; may be empty. Raises `BadField` when it is no text."""
    if not isinstance(value, str):
        raise BadField(f"{field} must be text, found {kind_of(value)}")
    text = html.unescape(value).strip()
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
        raise BadField(f"{field} holds half a character (a lone surrogate)")
    return text


def value_at(record: object, path: str) -> object:
    """The value at a path of names joined by dots; `ABSENT` where a step is missing."""
    if isinstance(record, Mapping) and path in record:
        return record[path]
    value = record
    for step in path.split("."):
        if not isinstance(value, Mapping) or step not in value:
            return ABSENT
        value = value[step]
    return value


def texts_in(value: object, field: str) -> tuple[str, ...]:
    """One value or nested lists of values as texts, in order. Raises `BadField` for what is no text, number or date.

    A whole number loses its ".0" and a day its midnight. Null, NaN, blanks and a tokenizer's special tokens are no text.
    """
    if value is ABSENT or value is None or value != value:  # NaN and NaT differ from themselves
        return ()
    if isinstance(value, (list, tuple)):
        return tuple(text for item in value for text in texts_in(item, field))
    if isinstance(value, datetime):
        value = value.date() if value.time() == time() else value.isoformat(" ")
    if isinstance(value, date):
        value = value.isoformat()
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool):
        if value in (float("inf"), float("-inf")):
            raise BadField(f"{field} is infinite")
        value = str(int(value)) if value == int(value) and abs(value) < 1e16 else str(value)
    text = clean(value, field)
    return (text,) if text and not _SPECIAL_TOKENS.fullmatch(text) else ()


def text_at(record: object, path: str) -> str:
    """The first text at a path. Raises `BadField` where there is none."""
    value = value_at(record, path)
    if value is ABSENT:
        raise BadField(f"{path} is absent")
    texts = texts_in(value, path)
    if not texts:
        held = "NaN" if value != value else "a special token" if isinstance(value, str) and value.strip() else "empty"
        raise BadField(f"{path} is {'null' if value is None else held}")
    return texts[0]


def texts_at(record: object, path: str | None) -> tuple[str, ...]:
    """The texts at a path, equal ones once; () without a path."""
    return distinct(texts_in(value_at(record, path), path)) if path else ()


def optional_text(record: object, path: str | None) -> str | None:
    """The first text at a path, or None where there is none. Raises `BadField` for what is no text."""
    return next(iter(texts_at(record, path)), None)


def id_of(record: Mapping[str, Any], field: str) -> int:
    """A whole number from 0 on, also where it was written as text. Raises `BadField`."""
    value = record.get(field)
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 18:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 10**18:
        raise BadField(f"{field} must be a whole number, found {kind_of(value)}" if field in record else f"{field} is absent")
    return value


def votes_of(record: Mapping[str, Any], field: str) -> Counter[str]:
    """How many annotators gave each answer, in order of first mention. Raises `BadField` when there is none."""
    value = record.get(field)
    if not isinstance(value, list):
        raise BadField(f"{field} must be a list of answers, found {kind_of(value)}" if field in record else f"{field} is absent")
    votes: Counter[str] = Counter()
    for entry in value:
        if not isinstance(entry, Mapping):
            raise BadField(f"{field} must hold objects with an 'answer', found {kind_of(entry)}")
        answer = clean(entry.get("answer"), f"{field}.answer")
        if answer:
            votes[answer] += 1
    if not votes:
        raise BadField(f"{field} holds no answer")
    return votes


def reasons(skipped: list[Skipped], most: int = 3) -> str:
    """The commonest reasons with their counts, for a message: "12 x no photo; 3 x target is empty"."""
    counts = Counter(s.reason for s in skipped)
    return "; ".join(f"{n} x {reason}" for reason, n in counts.most_common(most))


def span_of(text: str, wanted: str) -> str | None:
    """The whole words of a text that equal `wanted` up to case and Unicode form; None where there are none."""
    clusters: list[str] = []
    for c in text:
        if clusters and unicodedata.combining(c):
            clusters[-1] += c
        else:
            clusters.append(c)
    folded = [unicodedata.normalize("NFKC", c).casefold() for c in clusters]
    target = unicodedata.normalize("NFKC", wanted).casefold()
    for start in range(len(folded) if target else 0):
        stop, found = start, ""
        while stop < len(folded) and len(found) < len(target):
            found, stop = found + folded[stop], stop + 1
        inside = (start and (folded[start - 1] + folded[start]).isalnum()) or (
            "".join(folded[stop - 1 : stop + 1]).isalnum() and stop < len(folded)
        )
        if found == target and not inside:
            return "".join(clusters[start:stop])
    return None
