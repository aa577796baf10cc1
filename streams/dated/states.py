"""The states of a fact over time, and the changes between them that their dates make certain."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from itertools import pairwise
from pathlib import Path

from streams.base import Skipped
from streams.files.entry import DatedChange
from streams.files.fields import RecordReader
from streams.files.pictures import FilePicture
from streams.files.records import BadField, digest_of, normalize, read_bytes, texts_in

Day = tuple[int, int, int]
"""Year, month, day; 0 where month or day are not known."""
_DAY = re.compile(r"\+?(\d{1,4})(?:-(\d\d|##))?(?:-(\d\d|##))?(?:T.*)?")
_YEAR = re.compile(r"[1-9]\d{0,3}(\.\d+)?")
_UNIX = re.compile(r"\d{9,13}(\.\d+)?")
_UNKNOWN = re.compile(r"#*(-##)*")


@dataclass(frozen=True, slots=True)
class State:
    """A value of a fact from `start` to `end` (None where the end is unknown or has not come). `where` names the record."""

    value: str
    start: Day
    end: Day | None
    where: str


@dataclass(frozen=True, slots=True)
class Timeline:
    """A fact with its states. Where `prompt` needs its picture, `prompt_by_name` is the same question without one."""

    subject: str
    relation: str
    prompt: str
    states: tuple[State, ...]
    held_out: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    image: FilePicture | None = None
    prompt_by_name: str = ""
    source: str = ""

    @property
    def name(self) -> str:
        return f"{self.source}: {self.subject}, {self.relation}"


@dataclass
class SourceData(RecordReader):
    """The facts of one source, with the number of its records and those that were skipped."""

    timelines: list[Timeline] = field(default_factory=list)

    def read(self, path: Path) -> bytes:
        """The content of one of the source's files, whose hash is kept. Raises `BadStream`."""
        raw = read_bytes(path)
        self.digests.append(digest_of(raw))
        return raw


def read_day(value: object, name: str) -> Day | None:
    """A date as these sources write it: 2014, 2014-05, 2014-05-31, +2014-05-00T00:00:00Z, 2014-##-##; None for ####-##-##.

    A year may be a number, also 2014.0. Raises `BadField` for anything else.
    """
    bare = next(iter(texts_in(value, name)), "").removesuffix(".0")
    if not bare or bare.casefold() == "nan" or _UNKNOWN.fullmatch(bare):
        return None
    found = _DAY.fullmatch(bare)
    year, month, day = (int(p) if p and p.isdigit() else 0 for p in found.groups()) if found else (0, 0, 0)
    if not year or month > 12 or day > 31:
        raise BadField(f"{name} {bare[:30]!r} cannot be read: expected YYYY-MM-DD from year 1 on")
    return year, month, day if month else 0


def time_of(value: object, name: str) -> float:
    """A time in years: a year, an ISO date with or without time and zone (taken as UTC), or seconds or milliseconds since 1970.

    Raises `BadField` for anything else.
    """
    try:
        if not isinstance(value, date):
            text = next(iter(texts_in(value, name)), "")
            if _YEAR.fullmatch(text):
                return float(text)
            if _UNIX.fullmatch(text):
                seconds = float(text) / (1000 if len(text.split(".")[0]) > 11 else 1)
                value = datetime.fromtimestamp(seconds, UTC)
            else:
                value = datetime.fromisoformat(text)
        if isinstance(value, datetime):
            at = value.astimezone(UTC) if value.tzinfo else value
            return years((at.year, at.month, at.day)) + (at.hour * 3600 + at.minute * 60 + at.second) / 86400 / 372
        return years((value.year, value.month, value.day))
    except (ValueError, OverflowError, OSError) as e:
        if (found := read_day(value, name)) is None:
            raise BadField(f"{name} is absent or empty: no date") from e
        return years(found)


def day(year: int, month: int, number: int, name: str) -> Day:
    """A date from numbers. Raises `BadField` where they are no date."""
    if not (1 <= year <= 9999 and 0 <= month <= 12 and 0 <= number <= 31):
        raise BadField(f"{name} {year}-{month}-{number} is no date")
    return year, month, number if month else 0


def years(d: Day) -> float:
    """A date in years: 2014-07-01 is 2014.5; an unknown month or day counts as the first."""
    return d[0] + (max(d[1], 1) - 1) / 12 + (max(d[2], 1) - 1) / 372


def not_after(a: Day, b: Day) -> bool:
    """Whether a is no later than b, compared as far as both are known."""
    for x, y in zip(a, b):
        if x == 0 or y == 0:
            return True
        if x != y:
            return x < y
    return True


def state(value: str, start: Day | None, end: Day | None, where: str) -> State:
    """A state. Raises `BadField` where it has no beginning or ends before it begins."""
    if start is None:
        raise BadField("the start date is not known")
    if end is not None and not not_after(start, end):
        raise BadField(f"it ends ({_iso(end)}) before it begins ({_iso(start)})")
    return State(value, start, end, where)


def certain_changes(timeline: Timeline, skipped: list[Skipped]) -> list[DatedChange]:
    """The certain changes of a fact, oldest first; what is not certain is written to `skipped`.

    Strict: a state must have an end, and end no later than the next begins. Each change starts from the value
    that the change before it ended with.
    """
    out: list[DatedChange] = []
    ordered = sorted(timeline.states, key=lambda s: (s.start, s.end is None, s.end or (0, 0, 0), s.value))  # open ends last
    for old, new in pairwise(ordered):
        reason = _uncertain(old, new)
        previous = out[-1].target if out else old.value
        if reason is None and normalize(previous) == normalize(new.value):
            reason = "the value is the one before"
        if reason is not None:
            skipped.append(Skipped(new.where, reason))
            continue
        out.append(DatedChange(previous, new.value, years(new.start), tuple(_holding(timeline.states, new, previous))))
    return out


def _uncertain(old: State, new: State) -> str | None:
    if normalize(old.value) == normalize(new.value):
        return "the value is the one before"
    if old.end is None:
        return "the state before it has no end"
    return None if not_after(old.end, new.start) else "the state before it ends after it begins"


def _holding(states: Iterable[State], new: State, previous: str) -> Iterator[str]:
    """Other values that are known to hold for some time after `new` begins."""
    seen = {normalize(new.value), normalize(previous)}
    for s in states:
        if normalize(s.value) not in seen and s.end is not None and s.start <= new.start and not not_after(s.end, new.start):
            seen.add(normalize(s.value))
            yield s.value


def _iso(d: Day) -> str:
    return "-".join(f"{p:02d}" for p in d if p)
