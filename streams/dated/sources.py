"""Readers of dated facts: TempLAMA, DyKnow, YAGO11k, REIGN. Each takes a data root and fills a `SourceData`."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from streams.base import BadStream
from streams.data import table
from streams.dated.states import Day, SourceData, State, Timeline, day, read_day, state
from streams.files.records import BadField, clean, kind_of, parse_json, text_at, texts_in
from streams.files.tables import find_files, read_rows

PROMPTS: dict[str, dict[str, Any]] = table(__file__, "prompts.yaml")


def _timeline(source: str, subject: str, relation: str, states: Sequence[State]) -> Timeline:
    """A fact in the prompts of its relation."""

    def fill(texts: Sequence[str]) -> tuple[str, ...]:
        return tuple(t.replace("{}", subject) for t in texts)

    (prompt,), held_out, train = (fill(texts) for texts in PROMPTS[relation].values())
    return Timeline(subject, relation, prompt, tuple(states), held_out, train, source=source)


class Country(NamedTuple):
    """A state: `iso` is empty where it has no code today (it ended, or is not recognised); `since` is the first year from
    which today's flag stands for it."""

    name: str
    iso: str
    since: int


with Path(__file__).with_name("countries.csv").open(encoding="utf-8", newline="") as _file:
    COUNTRIES = {int(r["code"]): Country(r["name"], r["iso"], int(r["since"] or 0)) for r in csv.DictReader(_file)}
"""By the number of the Correlates of War project."""
YAGO = {"playsFor": "plays for", "worksAt": "works for", "isAffiliatedTo": "is affiliated to", "isMarriedTo": "is married to"}
"""YAGO's relations whose states follow one another, and our names for them."""
_ESCAPE = re.compile(r"\\u([0-9a-fA-F]{4})")


def templama(root: Path | None, data: SourceData) -> None:
    """`time_editing.json`: lists of states, each with the last year in which it held."""
    path = find_files(root, ["templama/time_editing.json"], "TempLAMA")[0]
    rows, digest = read_rows(path, data.skipped)
    data.digests.append(digest)

    def timeline(row: Any, where: str) -> Timeline:
        if not isinstance(row, list) or not row or not all(isinstance(s, Mapping) for s in row):
            raise BadField(f"expected a list of states, found {kind_of(row)}")
        data.total += len(row)
        return _templama_fact(row, where)

    data.timelines += data.usable(rows, timeline, path.name)


def _templama_fact(row: list[Mapping[str, Any]], where: str) -> Timeline:
    query = text_at(row[0], "query")
    for relation in PROMPTS:
        subject, found, _ = query.partition(f" {relation} _X_")
        if found and subject:
            break
    else:
        raise BadField("query is of no relation that is known here (expected 'NAME plays for _X_.' or the like)")
    last = [read_day(text_at(s, "date"), "date") for s in row]
    ends = [(d[0] + 1, 0, 0) for d in last if d]
    if len(ends) < len(row) or any(a >= b for a, b in pairwise(ends)):
        raise BadField("date: the years must be there and rise from state to state")
    starts = [(ends[0][0] - 1, 0, 0), *ends[:-1]]
    states = [state(_answer(s), a, b, f"{where} state {k}") for k, (s, a, b) in enumerate(zip(row, starts, ends))]
    return _timeline("TempLAMA", subject, relation, states)


def _answer(row: Mapping[str, Any]) -> str:
    given = row.get("answer")
    first = given[0] if isinstance(given, list) and given else given
    if not isinstance(first, Mapping):
        raise BadField(f"answer must be a list of objects with a name, found {kind_of(given)}")
    return text_at(first, "name")


def dyknow(root: Path | None, data: SourceData) -> None:
    """`qa_generated.json` (questions and dated answers), with the paraphrases of `grc_generated.json` beside it."""
    path = find_files(root, ["dyknow/qa_generated.json"], "DyKnow")[0]
    top = _object(path, data)
    beside = path.with_name("grc_generated.json")
    more = dict(_dyknow_facts(_object(beside, data), ())) if beside.is_file() else {}

    def timeline(item: tuple[tuple[str, ...], Mapping[str, Any]], where: str) -> Timeline:
        names, fact = item
        answers = fact["answers"]
        if not isinstance(answers, list):
            raise BadField(f"answers must be a list, found {kind_of(answers)}")
        data.total += len(answers)
        states = list(data.usable(answers, _dyknow_state, lambda k, _: f"{where} answer {k}"))
        return _dyknow_fact(names, fact, more.get(names, {}), states)

    facts = _dyknow_facts(top, ())
    data.timelines += data.usable(facts, timeline, lambda _, item: f"{path.name} {' / '.join(item[0])}")


def _object(path: Path, data: SourceData) -> Mapping[str, Any]:
    top = parse_json(data.read(path), path)
    if not isinstance(top, Mapping):
        raise BadStream(f"{path}: expected an object of groups of facts, found {kind_of(top)}. Is this the right file?")
    return top


def _dyknow_facts(value: object, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    if isinstance(value, Mapping) and "answers" in value:
        yield names, value
    elif isinstance(value, Mapping) and len(names) < 6:
        for name, inner in value.items():
            yield from _dyknow_facts(inner, (*names, str(name)))


def _dyknow_fact(names: tuple[str, ...], fact: Mapping[str, Any], more: Mapping[str, Any], states: list[State]) -> Timeline:
    prompts = _prompts(fact)
    if not prompts:
        raise BadField("questions holds no question")
    others = [p for p in _prompts(more) if p != prompts[0]]
    group, subject, relation = (*names, "", "", "")[:3]
    subject, relation = subject or group, relation or _GROUPS.get(group, group)
    return Timeline(subject, relation, prompts[0], tuple(states), tuple(others[:2]), tuple(others[2:]), source="DyKnow")


_GROUPS = {"athletes_byPayment": "plays for", "companies_byRevenue": "chief executive officer"}
"""The relation of DyKnow's groups that have one only."""


def _prompts(fact: Mapping[str, Any]) -> list[str]:
    given = fact.get("questions")
    return list(texts_in(list(given.values()) if isinstance(given, Mapping) else given, "questions"))


def _dyknow_state(answer: Any, where: str) -> State:
    """A state written as "Mario Monti |S: +2011-11-16T00:00:00Z |E: +2013-04-28T00:00:00Z"."""
    value, *marks = clean(answer, "answers").split(" |")
    dates = {m.partition(":")[0].strip(): m.partition(":")[2].strip() for m in marks}
    if not value.strip():
        raise BadField("the answer is empty")
    return state(value.strip(), read_day(dates.get("S", ""), "start"), read_day(dates.get("E", ""), "end"), where)


def yago(root: Path | None, data: SourceData) -> None:
    """`triple2id.txt` (subject, relation, object, from, to, tab-separated) with `entity2id.txt` and `relation2id.txt`."""
    path = find_files(root, ["yago11k/yago/triple2id.txt"], "YAGO11k")[0]
    names = {p[1]: _entity(p[0]) for _, p in _table(path.with_name("entity2id.txt"), 2, data)}
    relations = {p[1]: p[0].strip("<>") for _, p in _table(path.with_name("relation2id.txt"), 2, data)}
    facts: dict[tuple[str, str], list[State]] = {}
    unused: Counter[str] = Counter()
    for where, (s, r, o, start, end) in _table(path, 5, data):
        data.total += 1
        try:
            if r not in relations or s not in names or o not in names:
                raise BadField("an id is not in entity2id.txt or relation2id.txt")
            if relations[r] not in YAGO:
                unused[relations[r]] += 1
                continue
            found = state(names[o], read_day(start, "start"), read_day(end, "end"), where)
            facts.setdefault((names[s], YAGO[relations[r]]), []).append(found)
        except BadField as e:
            data.skip(where, str(e))
    for relation, n in sorted(unused.items()):
        data.skip(f"{path.name}, {n:,} records of {relation}", "the relation is no state of which one follows another")
    data.timelines += [_timeline("YAGO11k", s, r, states) for (s, r), states in facts.items()]


def _entity(name: str) -> str:
    return _ESCAPE.sub(lambda m: chr(int(m[1], 16)), name.removeprefix("<").removesuffix(">")).replace("_", " ").strip()


def _table(path: Path, width: int, data: SourceData) -> Iterator[tuple[str, list[str]]]:
    """The first `width` columns of each line of a tab-separated table, with the line's name; shorter lines are skipped."""
    for number, line in enumerate(data.read(path).decode("utf-8", "surrogateescape").split("\n"), 1):
        if not line.strip():
            continue
        where, parts = f"{path.name} line {number}", [p.strip() for p in line.rstrip("\r").split("\t")]
        if len(parts) < width or not all(parts[:width]):
            data.skip(where, f"expected {width} columns between tabs, found {len(parts)}")
        elif any("\ud800" <= c <= "\udfff" for c in line):
            data.skip(where, "not UTF-8: save the file as UTF-8")
        else:
            yield where, parts[:width]


def leaders(root: Path | None, data: SourceData) -> None:
    """REIGN's leader list: one leader a line, with country code (Correlates of War), day of entry and month of exit."""
    path = find_files(root, ["reign/data_sets/leaderlist*.csv"], "REIGN")[-1]
    rows = csv.DictReader(io.StringIO(data.read(path).decode("utf-8-sig", "surrogateescape"), newline=""))
    needed = {"ccode", "leader", "sdate", "smonth", "syear", "emonth", "eyear"}
    if missing := needed - set(rows.fieldnames or ()):
        raise BadStream(f"{path}: the columns {', '.join(sorted(missing))} are absent; found {', '.join(map(str, rows.fieldnames or ()))}.")
    facts: dict[int, list[State]] = {}

    def add(row: Mapping[str, Any], where: str) -> None:
        data.total += 1
        facts.setdefault(_country(row), []).append(_leader(row, where))

    try:
        list(data.usable(rows, add, path.name))
    except csv.Error as e:
        raise BadStream(f"{path}: cannot be read as a table after record {data.total}: {e}. Fetch it again.") from e
    data.timelines += [_timeline("REIGN", COUNTRIES[c].name, "is led by", states) for c, states in sorted(facts.items())]


def _country(row: Mapping[str, Any]) -> int:
    code = _whole(row, "ccode")
    if code not in COUNTRIES:
        raise BadField(f"ccode {code} is not in our table of countries")
    return code


def _leader(row: Mapping[str, Any], where: str) -> State:
    start = day(_whole(row, "syear"), _whole(row, "smonth"), _whole(row, "sdate"), "start")
    end: Day | None = None
    if (row.get("eyear") or "").strip().casefold() not in ("", "nan"):
        end = day(_whole(row, "eyear"), _whole(row, "emonth"), 0, "end")
    return state(text_at(row, "leader"), start, end, where)


def _whole(row: Mapping[str, Any], name: str) -> int:
    value = (row.get(name) or "").strip().removesuffix(".0")  # pandas writes whole numbers of a column with gaps so
    if not (value.isascii() and value.isdigit() and len(value) < 6):
        raise BadField(f"{name} must be a whole number, found {value[:20]!r}")
    return int(value)
