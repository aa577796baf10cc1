"""One suite for every registered stream: a new stream is enrolled by lying in its folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from streams.base import BadStream, Stream, StreamConfig, question_key
from testbed.checks.contract import title
from testbed.checks.streams import CHECKS, N, StreamCase
from testbed.core.events import check_order
from testbed.core.registry import STREAMS
from tests.helpers.okedit_folder import make_folder
from tests.helpers.real_files import CASES as REAL
from tests.helpers.real_files import own_record, small_copy
from tests.helpers.written_files import WRITTEN

FILES = "okedit-yearly on files"
OWN = "jsonl:records.jsonl"
DATED = "jsonl:dated.jsonl"
BOTH = "merged:jsonl:records.jsonl+jsonl:others.jsonl"
_NAMES = [name for name in STREAMS.names() if not name.endswith(":")]
CASES = [*_NAMES, FILES, OWN, DATED, BOTH, *(name for name in REAL if name not in _NAMES)]
Make = Callable[..., Stream]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("files") / "okedit", [*range(1005, 2405, 10), 1006, 1016])


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def make(request: pytest.FixtureRequest, case: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a fresh instance of one stream: `make(seed=1)`."""
    if case == FILES:
        return lambda **config: STREAMS.get("okedit-yearly")(StreamConfig(data_root=folder, **config))
    if case == DATED:
        records = tmp_path_factory.mktemp("dated")
        rows = [own_record(i) | {"target": f"Ann {i}.{k}", "when": 2000 + 3 * k + i % 3} for i in range(80) for k in range(3)]
        (records / "dated.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return lambda **config: STREAMS.get(case)(StreamConfig(data_root=records, fields=("time=when",), **config))
    if case in (OWN, BOTH):
        records = tmp_path_factory.mktemp("own")
        (records / "records.jsonl").write_text("\n".join(json.dumps(own_record(i)) for i in range(300)))
        (records / "others.jsonl").write_text("\n".join(json.dumps(own_record(i)) for i in range(250, 500)))
        return lambda **config: STREAMS.get(case)(StreamConfig(data_root=records, **config))
    if case in WRITTEN:
        written = WRITTEN[case].write(tmp_path_factory.mktemp("written"))
        return lambda **config: STREAMS.get(case)(StreamConfig(data_root=written, **config))
    if case in REAL:
        real = REAL[case]
        root = small_copy(real, request.getfixturevalue("data_root"), tmp_path_factory.mktemp("real"))
        return lambda **config: STREAMS.get(real.stream)(StreamConfig(data_root=root, **{**real.config, **config}))
    return lambda **config: STREAMS.get(case)(StreamConfig(**config))


@pytest.fixture(scope="module")
def lacks(case: str) -> frozenset[str]:
    """What the case's source does not have (see `real_files` and `written_files`)."""
    known = {**REAL, **WRITTEN}
    return known[case].lacks if case in known else frozenset()


@pytest.fixture(scope="module")
def stream(stream_case: StreamCase) -> Stream:
    return stream_case.stream


@pytest.fixture(scope="module")
def stream_case(make: Make) -> StreamCase:
    return StreamCase(make)


def test_the_main_streams_are_registered() -> None:
    names = STREAMS.names()
    assert names
    assert {"okedit-yearly", "world-yearly"} <= set(names)


def test_every_stream_has_a_card() -> None:
    cards = Path(__file__).parents[2] / "streams" / "cards"
    missing = [name for name in STREAMS.names() if not (cards / f"{name.rstrip(':')}.md").is_file()]
    assert not missing


def test_every_stream_runs_without_files_or_says_what_it_needs() -> None:
    for name, cls in STREAMS.items():
        if name in REAL or name in WRITTEN:
            with pytest.raises(BadStream, match="--data-root"):
                cls(StreamConfig())
        elif name.endswith(":"):
            with pytest.raises(BadStream, match=f"needs its source in its name: {name}"):
                cls(StreamConfig())
        else:
            assert cls(StreamConfig()).events(1)


@pytest.mark.parametrize("check", CHECKS, ids=title)
def test_a_stream_keeps_its_contract(check: Callable[[StreamCase], None], stream_case: StreamCase) -> None:
    check(stream_case)


def test_the_first_events_add_and_revise_facts(stream: Stream, lacks: frozenset[str]) -> None:
    events = stream.events(N)
    assert len(events) > 100
    assert {"add", *(() if lacks & {"old answers", "revisions"} else ("revise",))} <= {e.kind for e in events}


def test_a_stream_has_what_its_source_has(stream: Stream, stream_case: StreamCase, lacks: frozenset[str]) -> None:
    asked = stream_case.asked
    rephrased = sum("text_generality" in {q.split for q in questions} for _, questions in asked)
    assert (rephrased < 0.9 * len(asked)) == ("rephrased" in lacks)
    assert (not any(stream.paraphrases(e) for e, _ in asked)) == ("paraphrases" in lacks)
    assert asked[0][0].image is None or any(q.image is not None for _, questions in asked[:3] for q in questions)


def test_a_stream_gives_questions_beliefs_and_something_to_learn_from(stream: Stream, lacks: frozenset[str]) -> None:
    if "old answers" in lacks:
        assert stream.general() and stream.train_pool().texts
        assert all(q.topic.startswith("locality_") for q in stream.beliefs())
        return
    pool, beliefs = stream.train_pool(), {question_key(q): q.answer for q in stream.beliefs()}
    assert stream.general() and pool.questions and len(beliefs) > 50
    assert any(beliefs.get(question_key(e)) == e.previous for e in stream.events(N) if e.kind == "add")
    assert len({e.event.id for e in pool.edits}) == len(pool.edits) > 0
    assert any(e.rephrasings or e.locality for e in pool.edits)


@pytest.mark.parametrize("name", ["records", "since"])
def test_a_stream_refuses_a_setting_that_it_does_not_support(make: Make, stream: Stream, name: str) -> None:
    """A supported setting changes the edits; nothing is passed over in silence."""
    events = stream.events(N)
    value = 60 if name == "records" else events[-1].year
    sources = getattr(stream, "parts", [stream])
    if all(name in s.supports for s in sources):
        assert [e.id for e in make(**{name: value}).events(N)] != [e.id for e in events]
        return
    with pytest.raises(BadStream, match=f"stream.{name}"):
        make(**{name: value})


def test_two_thousand_edits_are_in_order(stream: Stream) -> None:
    events = stream.events(2000)
    check_order(events)
    assert all(stream.questions(event) for event in events[::40])
    assert stream.time_axis != "simulated" or len(events) == 2000


def test_shares_of_the_schedule_are_kept(make: Make) -> None:
    """No revision, revert or retirement where their shares are zero and fresh facts are left; real dates stay as they are."""
    stream = make(revise=0.0, revert=0.0, retire=0.0)
    events = stream.events(60)
    if stream.time_axis == "dated":
        assert events == make().events(60)
        return
    assert {e.kind for e in events} == {"add"}
    assert len({e.fact for e in events}) == 60


def test_importing_streams_loads_no_torch() -> None:
    code = "import sys, testbed.core.registry as r; r.STREAMS.names(); print(sorted({'torch', 'transformers', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.strip() == "[]"


def test_edits_per_year_moves_dates_and_nothing_else(make: Make) -> None:
    slow, fast = make(edits_per_year=10), make(edits_per_year=100)
    assert [e.id for e in slow.events(40)] == [e.id for e in fast.events(40)]
    if slow.time_axis == "dated":
        assert slow.events(40) == fast.events(40)
        return
    assert slow.events(40)[-1].year == 4
    assert fast.events(40)[-1].year == 1
