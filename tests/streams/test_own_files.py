"""The formats of one's own files, and the dates in them."""

from __future__ import annotations

import gzip
import json
import math
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streams.base import BadStream
from streams.dated.states import time_of
from streams.files.records import BadField
from testbed.core.events import check_order
from tests.helpers.own_records import N, record, stream

# files -------------------------------------------------------------------------------------------------------

LISTED = [record(i) for i in range(40)]


def table(delimiter: str) -> str:
    lines = [delimiter.join(LISTED[0]), *(delimiter.join(map(str, r.values())) for r in LISTED)]
    return "\n".join(lines)


def parquet() -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(LISTED), sink)
    return sink.getvalue()


LINES = "\n".join(map(json.dumps, LISTED))
FORMATS: dict[str, str | bytes] = {
    "JSON": json.dumps(LISTED),
    "JSON, indented": json.dumps(LISTED, indent=2),
    "JSON lines": LINES,
    "JSON lines, a mark on each": "\n".join("\ufeff" + line for line in LINES.split("\n")),
    "JSON lines, UTF-16": LINES.encode("utf-16"),
    "JSON lines, CRLF": LINES.replace("\n", "\r\n"),
    "objects one after another": "\n".join(json.dumps(r, indent=1) for r in LISTED),
    "a list in an object": json.dumps({"version": "1", "data": LISTED}),
    "columns": json.dumps({k: [r[k] for r in LISTED] for k in LISTED[0]}),
    "columns by index": json.dumps({k: {str(i): r[k] for i, r in enumerate(LISTED)} for k in LISTED[0]}),
    "CSV": table(","),
    "TSV": table("\t"),
    "CSV with semicolons": table(";"),
    "gzip": gzip.compress(LINES.encode(), mtime=0),
    "Parquet": parquet(),
}


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("file", ["own.jsonl", "own.csv", "own"])
def test_the_format_is_told_by_the_content(tmp_path: Path, name: str, file: str) -> None:
    s, expected = stream(tmp_path, FORMATS[name], file), stream(tmp_path, LISTED)
    assert [e.id for e in s.events(N)] == [e.id for e in expected.events(N)]
    assert not s.skipped


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "there are no records"),
        (json.dumps({"train": LISTED, "test": LISTED}).encode(), r"several: train \(40\), test \(40\)"),
        (b"just words", "found 'just words'"),
        (b"PAR1 and no more", "Parquet file cannot be read"),
        (gzip.compress(LINES.encode(), mtime=0)[:60], "gzip file cannot be unpacked"),
        (LINES.encode()[:40], "cut short"),
        ("\n".join(json.dumps(record(i) | {"target": f"é{i}"}, ensure_ascii=False) for i in range(9)).encode("latin-1"), "UTF-8"),
    ],
)
def test_a_file_that_is_no_table_says_why(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(BadStream, match=message):
        stream(tmp_path, content)


def test_lines_of_a_table_with_other_fields_are_named(tmp_path: Path) -> None:
    s = stream(tmp_path, table(",") + "\na,b\n1,2,3,4,5,6\n")
    assert [(k.where, k.reason) for k in s.skipped] == [(f"own.jsonl line {n}", "expected 5 fields as in the header") for n in (42, 43)]


# time --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "years"),
    [
        (2011, 2011.0),
        (2011.0, 2011.0),
        ("2011.5", 2011.5),
        ("2011-07", 2011.5),
        ("2011-07-01", 2011.5),
        ("20110701", 2011.5),
        (date(2011, 7, 1), 2011.5),
        ("+2011-07-00T00:00:00Z", 2011.5),
        ("2011-07-01T02:00:00+02:00", 2011.5),
        (datetime(2011, 7, 1, 2, tzinfo=timezone(timedelta(hours=2))), 2011.5),
        (1309478400, 2011.5),
        ("1309478400000", 2011.5),
        ("2011-01-01T12:00:00", 2011 + 0.5 / 372),
    ],
)
def test_a_time_is_read_in_years(value: object, years: float) -> None:
    assert time_of(value, "t") == pytest.approx(years, abs=1e-9)


@pytest.mark.parametrize("value", [None, "", math.nan, "soon", True, "2011-13-01", "####-##-##", 10**20, {}, -5])
def test_a_time_that_cannot_be_read_is_refused(value: object) -> None:
    with pytest.raises(BadField, match="t "):
        time_of(value, "t")


@given(st.lists(st.datetimes(min_value=datetime(1000, 1, 1)), min_size=2, max_size=5))
def test_times_keep_their_order(times: list[datetime]) -> None:
    found = [time_of(t.isoformat(), "t") for t in sorted(times)]
    assert found == sorted(found)
    assert all(int(y) == t.year for y, t in zip(found, sorted(times)))


def dated(n: int = 40, changes: int = 3) -> list[dict[str, Any]]:
    rows = [
        record(
            i, target=f"value {i}.{k}", previous=f"value {i}.{k - 1}", when=f"{2000 + 2 * k}-{1 + i % 12:02d}-05", rephrase=f"Town {i}.{k}?"
        )
        for i in range(n)
        for k in range(changes)
    ]
    return rows[1::2] + rows[::2]


def test_later_records_of_a_question_are_its_revisions_in_their_real_order(tmp_path: Path) -> None:
    s = stream(tmp_path, dated(), fields=("time=when",))
    events = s.events(10**6)
    check_order(events)
    assert s.time_axis == "dated"
    assert "120 dated changes of 40 facts" in s.origin
    assert not s.skipped
    by_fact: dict[str, list[str]] = {}
    for e in events:
        assert e.year == 2000 + 2 * int(e.target[-1])
        by_fact.setdefault(e.prompt, []).append(e.target)
    assert all([v[-1] for v in values] == ["0", "1", "2"] for values in by_fact.values())
    assert {e.kind for e in events} == {"add", "revise"}
    assert not any("invented" in note for note in s.notes(events))
    assert s.manifest()["edits_by_year"].keys() == {"2000", "2002", "2004"}
    late = stream(tmp_path, dated(), fields=("time=when",), since=2002)
    assert {e.year for e in late.events(10**6)} == {2002, 2004}
    assert all(e.previous == e.target[:-1] + "0" for e in late.events(10**6) if e.kind == "add")


def test_a_portability_answer_holds_for_the_value_of_its_own_record(tmp_path: Path) -> None:
    rows = [
        record(i, target=f"v{k}", when=2000 + k, portability=[{"prompt": "Q?", "ground_truth": f"a{k}"}]) for i in range(40) for k in (0, 1)
    ]
    s = stream(tmp_path, rows, fields=("time=when",))
    for e in s.events(10**6):
        assert [q.answer for q in s.questions(e) if q.split == "portability"] == [f"a{e.target[1]}"]


def test_what_has_no_date_or_no_change_is_named(tmp_path: Path) -> None:
    rows = [*dated(), record(50, when="soon"), record(51, when=None), record(52, when=2001), record(52, when=2003)]
    s = stream(tmp_path, rows, fields=("time=when",))
    assert [k.reason.partition(":")[0] for k in s.skipped] == [
        "when 'soon' cannot be read",
        "when is absent or empty",
        "the value is the one before",
    ]


def test_years_without_a_named_time_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadStream, match=r"does not support stream\.since"):
        stream(tmp_path, dated(), since=2002)
    s = stream(tmp_path, dated())
    assert s.time_axis == "scheduled"
    assert sum(k.reason == "the same question stands in an earlier record" for k in s.skipped) == 80


def test_no_revision_is_invented_without_a_relation(tmp_path: Path) -> None:
    rows = [record(i) for i in range(N)]
    invented = stream(tmp_path, rows)
    share = sum(e.kind == "revise" for e in invented.events(150))
    assert f"{share} of 150 edits ({share / 150:.0%}) are invented revisions" in "\n".join(invented.notes(invented.events(150)))
    bare = stream(tmp_path, [{k: v for k, v in r.items() if k != "relation"} for r in rows])
    assert "revise" not in {e.kind for e in bare.events(10**6)}
    assert "no relation is given (stream.fields=relation=...), so no revision is invented" in bare.notes(bare.events(10))
