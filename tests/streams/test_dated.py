"""Dated streams: what counts as a certain change, the real files' counts as the cards say them, bad input by name."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.base import BadStream, Skipped, StreamConfig
from streams.dated.sources import COUNTRIES, leaders
from streams.dated.states import Day, SourceData, Timeline, certain_changes, not_after, read_day, state, years
from streams.files.records import BadField
from testbed.core.events import check_order
from testbed.core.registry import STREAMS

CARDS = Path(__file__).parents[2] / "streams" / "cards"
FOLDERS = {"templama": "templama", "dyknow": "dyknow", "yago": "yago11k", "leaders": "reign", "leaders-flags": ".", "dated-facts": "."}


def line(*states: tuple[str, Day, Day | None]) -> Timeline:
    return Timeline("S", "r", "Who?", tuple(state(v, a, b, f"record {i}") for i, (v, a, b) in enumerate(states)), source="x")


def test_only_a_state_that_ended_is_replaced() -> None:
    skipped: list[Skipped] = []
    facts = line(("a", (1990, 0, 0), (1995, 0, 0)), ("b", (1995, 3, 0), (1999, 0, 0)), ("c", (1998, 0, 0), None), ("d", (2001, 0, 0), None))
    found = certain_changes(facts, skipped)
    assert [(m.previous, m.target, m.time) for m in found] == [("a", "b", 1995 + 2 / 12)]
    assert [(s.where, s.reason) for s in skipped] == [
        ("record 2", "the state before it ends after it begins"),
        ("record 3", "the state before it has no end"),
    ]


def test_a_change_starts_from_the_value_installed_before() -> None:
    skipped: list[Skipped] = []
    a, b = ("a", (1990, 0, 0), (1991, 0, 0)), ("b", (1991, 0, 0), (1996, 0, 0))
    c, d = ("c", (1992, 0, 0), (1993, 0, 0)), ("d", (1994, 0, 0), (1995, 0, 0))
    found = certain_changes(line(a, b, c, d), skipped)
    assert [(m.previous, m.target, m.aliases) for m in found] == [("a", "b", ()), ("b", "d", ())]
    assert len(skipped) == 1


DAYS = st.tuples(st.integers(1, 30), st.integers(0, 12), st.integers(0, 31))


@given(st.lists(st.tuples(st.sampled_from("abc"), DAYS, st.none() | DAYS), max_size=8))
def test_changes_rise_in_time_and_chain(rows: list[tuple[str, Day, Day | None]]) -> None:
    good = [r for r in rows if r[2] is None or not_after(r[1], r[2])]
    found = certain_changes(line(*good), [])
    assert [m.time for m in found] == sorted(m.time for m in found)
    assert all(x.target == y.previous for x, y in pairwise(found))
    assert all(m.previous != m.target for m in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2014", (2014, 0, 0)),
        ("+2014-05-00T00:00:00Z", (2014, 5, 0)),
        ("1945-11-07", (1945, 11, 7)),
        ("360-##-##", (360, 0, 0)),
        ("####-##-##", None),
        ("", None),
    ],
)
def test_dates_are_read(text: str, expected: Day | None) -> None:
    assert read_day(text, "start") == expected


@pytest.mark.parametrize("text", ["19##-##-##", "-044-03-15", "2014-13-01", "2014-01-40", "yesterday", "0", True, {}, "20145-01-01", "1e3"])
def test_other_dates_are_refused(text: Any) -> None:
    with pytest.raises(BadField, match="start"):
        read_day(text, "start")


def test_a_state_may_not_end_before_it_begins() -> None:
    with pytest.raises(BadField, match=r"ends \(1999\) before it begins \(2001-05\)"):
        state("a", (2001, 5, 0), (1999, 0, 0), "x")
    assert years((2014, 7, 1)) == 2014.5


def test_the_country_table_is_one_to_one() -> None:
    isos = [c.iso for c in COUNTRIES.values() if c.iso]
    names = [c.name for c in COUNTRIES.values()]
    assert len(COUNTRIES) == len(set(names)) == 201
    assert len(set(isos)) == len(isos)
    assert all(re.fullmatch("[A-Z]{2}", i) for i in isos)
    assert (COUNTRIES[365].name, COUNTRIES[365].since, COUNTRIES[255].name) == ("Russia", 1992, "Germany before 1990")


@pytest.mark.parametrize("name", list(FOLDERS))
def test_the_card_says_what_the_files_give(name: str, data_root: Path) -> None:
    s = STREAMS.get(name)(StreamConfig(data_root=data_root / FOLDERS[name]))
    events = s.events(10**6)
    check_order(events)
    adds = sum(e.kind == "add" for e in events)
    card = (CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert f"{len(events):,} edits ({adds:,} add, {len(events) - adds:,} revise)" in card
    assert f"{events[0].year} to {events[-1].year}" in card
    found = re.match(r".*, ([\d,]+) dated changes of ([\d,]+) facts, ([\d,]+) of these", s.origin)
    assert found
    assert f"{found[1]} changes" in card
    assert s.size == f"{found[1]} changes of {found[2]} facts"
    assert f"{found[3]} facts are never edited" in card
    assert sum(s.counts()["edits_by_year"].values()) == len(events)


def test_a_stream_that_begins_later_is_its_last_part(tmp_path: Path) -> None:
    rows = [[query(i, "2010", f"A{i}"), query(i, "2012", f"B{i}"), query(i, "2015", f"C{i}")] for i in range(40)]
    (tmp_path / "time_editing.json").write_text(json.dumps(rows))
    whole, late = (STREAMS.get("templama")(StreamConfig(data_root=tmp_path, since=y)) for y in (0, 2012))
    assert [(e.prompt, e.target, e.time) for e in late.events(99)] == [
        (e.prompt, e.target, e.time) for e in whole.events(99) if e.year >= 2012
    ]
    assert {e.kind for e in late.events(99)} == {"add"} and {e.kind for e in whole.events(99)} == {"add", "revise"}
    assert {(q.answer or "")[0] for q in whole.beliefs()} == {"A"} and {(q.answer or "")[0] for q in late.beliefs()} == {"B"}
    assert {(q.answer or "")[0] for q in late.general()} == {"B"}
    assert late.counts()["changes_before"] == 40 and "from 2012 on" in late.origin
    with pytest.raises(BadStream, match="none of 120 records makes a change from 2030 on"):
        STREAMS.get("templama")(StreamConfig(data_root=tmp_path, since=2030))
    with pytest.raises(BadStream, match="since must be 0"):
        STREAMS.get("templama")(StreamConfig(data_root=tmp_path, since=-5))


# bad input ---------------------------------------------------------------------------------------------------


def query(i: int, date: Any, name: Any) -> dict[str, Any]:
    return {"query": f"P{i} plays for _X_.", "answer": [{"name": name}], "date": date}


def test_templama_names_the_records_that_it_skips(tmp_path: Path) -> None:
    good = [[query(i, "2012", f"A{i}"), query(i, "2015", f"B{i}")] for i in range(60)]
    bad = [
        [query(100, "2015", "A"), query(100, "2012", "B")],
        [query(101, "soon", "A"), query(101, "2012", "B")],
        [query(102, "2011", ""), query(102, "2012", "B")],
        [query(103, True, "A")],
        [{"query": "X is Y _X_.", "answer": [{"name": "A"}], "date": "2012"}],
        "text",
        [],
    ]
    (tmp_path / "time_editing.json").write_text(json.dumps(good + bad))
    s = STREAMS.get("templama")(StreamConfig(data_root=tmp_path))
    assert [k.where for k in s.skipped] == [f"time_editing.json record {60 + i}" for i in range(len(bad))]
    assert all(word in k.reason for word, k in zip(("rise", "soon", "name", "date", "relation", "list", "list"), s.skipped))
    assert {e.time for e in s.events(100)} == {2013.0}


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"[[{", "line 1"), (b"{}", "expected a list"), (b"[]", "none of 0 records"), (b"[\xff]", "UTF-8")],
)
def test_templama_whole_file(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "time_editing.json").write_bytes(content)
    with pytest.raises(BadStream, match=message):
        STREAMS.get("templama")(StreamConfig(data_root=tmp_path))


def test_a_leader_list_with_bad_lines(tmp_path: Path) -> None:
    head = b"ccode,leader,sdate,smonth,syear,emonth,eyear\n"
    rows = [b"2,A,1,1,1950,1,1953", b"2,B,20,1,1953,,", b"2,C,x,1,1960,,", b"9999,D,1,1,1960,,", b"20,E\xff,1,1,1960,,", b"20,,1,1,1960,,"]
    (tmp_path / "leaderlist_1.csv").write_bytes(head + b"\n".join(rows))
    data = SourceData()
    leaders(tmp_path, data)
    assert [(s.where.rpartition(" ")[2], s.reason.split(" ")[0]) for s in data.skipped] == [
        ("2", "sdate"),
        ("3", "ccode"),
        ("4", "leader"),
        ("5", "leader"),
    ]
    (tmp_path / "leaderlist_1.csv").write_bytes(b"a,b\n1,2\n")
    with pytest.raises(BadStream, match=r"columns ccode, .*are absent; found a, b"):
        STREAMS.get("leaders")(StreamConfig(data_root=tmp_path))
