"""`merged:A+B`: several streams in one order of time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from streams.base import BadStream, Stream, StreamConfig
from testbed.core.events import check_order
from testbed.core.registry import STREAMS
from tests.helpers.real_files import own_record


def merged(root: Path, names: str, **config: Any) -> Stream:
    return STREAMS.get(f"merged:{names}")(StreamConfig(data_root=root, **config))


def own(root: Path, name: str, numbers: range) -> None:
    (root / name).write_text("\n".join(json.dumps(own_record(i)) for i in numbers))


def test_merged_streams_keep_time_order_and_their_own_questions(tmp_path: Path) -> None:
    own(tmp_path, "a.jsonl", range(100))
    own(tmp_path, "b.jsonl", range(1000, 1100))
    both = merged(tmp_path, "jsonl:a.jsonl+jsonl:b.jsonl", edits_per_year=20)
    events = both.events(100)
    check_order(events)
    assert both.events(37) == events[:37]
    parts = [STREAMS.get(f"jsonl:{n}.jsonl")(StreamConfig(data_root=tmp_path)) for n in "ab"]
    for part in parts:
        ids = [e.id for e in part.events(50)]
        assert [e.id for e in events if e.id in ids] == ids
    assert Counter(e.year for e in events) == dict.fromkeys(range(1, 6), 20)
    first = parts[0].events(1)[0]
    assert [q.id for q in both.questions(first) if q.split != "locality_far"] == [
        q.id for q in parts[0].questions(first) if q.split != "locality_far"
    ]


def test_the_first_stream_keeps_a_question_that_two_streams_edit(tmp_path: Path) -> None:
    own(tmp_path, "a.jsonl", range(100))
    own(tmp_path, "b.jsonl", range(50, 150))
    both = merged(tmp_path, "jsonl:a.jsonl+jsonl:b.jsonl")
    events = both.events(10**6)
    check_order(events)
    assert len({e.prompt for e in events if e.kind == "add"}) == sum(e.kind == "add" for e in events)
    assert sum(s.reason == "an earlier stream edits the same question" for s in both.skipped) > 30
    edited = {e.prompt for e in events}
    local = {q.prompt for e in events for q in both.questions(e) if q.split.startswith("locality_")}
    assert not edited & (local | {q.prompt for q in both.general()} | {q.prompt for q in both.train_pool().questions})


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("", "needs its source in its name"),
        ("world-yearly", "two streams or more"),
        ("world-yearly+world-yearly", "two streams or more"),
        ("world-yearly+", "two streams or more"),
        ("world-yearly+okedit-yearly", "several streams would edit one simulated world"),
    ],
)
def test_streams_that_cannot_be_merged_are_refused(names: str, message: str) -> None:
    with pytest.raises(BadStream, match=message):
        STREAMS.get(f"merged:{names}")(StreamConfig())


def test_dates_and_drawn_years_are_not_merged(data_root: Path) -> None:
    with pytest.raises(BadStream, match=r"no common time \(leaders is dated, world-yearly is simulated\)"):
        merged(data_root, "leaders@reign+world-yearly")
    both = merged(data_root, "leaders@reign+templama@templama")
    events = both.events(10**6)
    check_order(events)
    assert both.time_axis == "dated"
    assert {e.source.split(":")[0] for e in events} == {"REIGN", "TempLAMA"}
