"""One suite for every registered stream: a new stream is enrolled by lying in its folder."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streams.base import BadStream, Stream, StreamConfig
from streams.files.records import normalize
from testbed.checks.streams import StreamCase, the_train_edits_touch_no_edit_and_no_question
from testbed.core.events import LOCALITY_SPLITS, EditBatch, EditEvent, Picture, Question, check_order
from testbed.core.registry import STREAMS
from tests.helpers.okedit_folder import make_folder
from tests.helpers.real_files import CASES as REAL
from tests.helpers.real_files import own_record, small_copy

N = 300
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
    if case in REAL:
        real = REAL[case]
        root = small_copy(real, request.getfixturevalue("data_root"), tmp_path_factory.mktemp("real"))
        return lambda **config: STREAMS.get(real.stream)(StreamConfig(data_root=root, **{**real.config, **config}))
    return lambda **config: STREAMS.get(case)(StreamConfig(**config))


@pytest.fixture(scope="module")
def lacks(case: str) -> frozenset[str]:
    """What the case's source does not have (see `real_files`)."""
    return REAL[case].lacks if case in REAL else frozenset()


@pytest.fixture(scope="module")
def stream(make: Make) -> Stream:
    return make()


@pytest.fixture(scope="module")
def asked(stream: Stream) -> list[tuple[EditEvent, tuple[Question, ...]]]:
    return [(e, stream.questions(e)) for e in stream.events(N)]


@cache
def key(picture: Picture | None) -> str:
    return "" if picture is None else picture.key


def question_key(item: EditEvent | Question) -> tuple[str, str]:
    """The key of the picture, and the prompt."""
    return key(item.image), item.prompt


def texts(value: Any) -> Iterable[str]:
    """Every string that can be reached from a value made of tuples, lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from texts(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from texts(item)


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
        if name in REAL:
            with pytest.raises(BadStream, match="--data-root"):
                cls(StreamConfig())
        elif name.endswith(":"):
            with pytest.raises(BadStream, match=f"needs its source in its name: {name}"):
                cls(StreamConfig())
        else:
            assert cls(StreamConfig()).events(1)


def test_the_manifest_describes_the_stream(stream: Stream) -> None:
    assert "\n" not in stream.summary
    assert stream.summary
    assert stream.time_axis in ("dated", "scheduled", "simulated")
    assert ("simulated" in stream.origin) == (stream.time_axis == "simulated")
    manifest = json.loads(json.dumps(stream.manifest()))
    assert (manifest["time_axis"], manifest["origin"]) == (stream.time_axis, stream.origin)
    assert manifest["licence"]


def test_order_ids_and_years(stream: Stream) -> None:
    events = stream.events(N)
    assert 100 < len(events) <= N
    check_order(events)
    if stream.time_axis != "dated":
        assert events[0].year == 1
        assert [e.year for e in events].count(1) == stream.config.edits_per_year
    assert {"add", "revise"} <= {e.kind for e in events}


def test_the_same_events_twice(make: Make) -> None:
    one, two = make(), make()
    assert one.stream_hash(one.events(N)) == two.stream_hash(two.events(N))
    assert one.data_hash() == two.data_hash()
    assert [q.id for q in one.general()] == [q.id for q in two.general()]
    event = one.events(20)[-1]
    assert [q.id for q in one.questions(event)] == [q.id for q in two.questions(event)]


@pytest.mark.parametrize("k", [0, 1, 37, 150])
def test_the_first_events_do_not_depend_on_how_many(make: Make, k: int) -> None:
    short, long = make(), make()
    assert short.events(k) == long.events(N)[:k]
    again = short.events(N)
    assert again[:k] == short.events(k)
    assert again == long.events(N)


def test_a_drifting_stream_keeps_the_contract(make: Make) -> None:
    one, two = make(drift=True), make(drift=True)
    check_order(one.events(N))
    assert two.events(40) == one.events(N)[:40]
    assert {e.fact for e in one.events(N)} - {e.fact for e in one.events(40)}


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


def test_another_seed_is_another_order_of_the_same_data(make: Make) -> None:
    one, two = make(seed=0), make(seed=1)
    assert one.data_hash() == two.data_hash()
    if one.time_axis == "dated":  # the seed orders changes of one date only
        assert {e.id for e in one.events(10**6)} == {e.id for e in two.events(10**6)}
        return
    assert [e.id for e in one.events(50)] != [e.id for e in two.events(50)]


def test_a_change_starts_from_the_value_before_it(stream: Stream) -> None:
    by_id: dict[str, EditEvent] = {}
    for e in stream.events(N):
        if e.revises:
            before = by_id[e.revises]
            assert before.fact == e.fact
            assert before.kind == "retire" or e.previous == before.target
        assert e.target != e.previous
        by_id[e.id] = e
    replaced = [e.revises for e in by_id.values() if e.revises]
    assert len(set(replaced)) == len(replaced)


def test_questions_belong_to_their_event(asked: list[tuple[EditEvent, tuple[Question, ...]]], lacks: frozenset[str]) -> None:
    ids: set[str] = set()
    rephrased = 0
    for event, questions in asked:
        assert all(q.event_id == event.id for q in questions)
        assert not ids & {q.id for q in questions}
        ids |= {q.id for q in questions}
        edit = [q for q in questions if q.split == "edit"]
        assert [question_key(q) for q in edit] == [question_key(event)]
        assert event.kind == "retire" or edit[0].answer == event.target
        rephrased += "text_generality" in {q.split for q in questions}
    assert (rephrased < 0.9 * len(asked)) == ("rephrased" in lacks)


def test_stale_answers_are_the_previous_value(asked: list[tuple[EditEvent, tuple[Question, ...]]]) -> None:
    stale = [(e, q) for e, questions in asked for q in questions if q.split == "stale"]
    assert len(stale) == len([e for e, _ in asked if e.previous is not None])
    for event, question in stale:
        assert question.answer == event.previous
        assert event.target not in question.golds
        assert question_key(question) == question_key(event)


def test_paraphrases_are_not_asked(stream: Stream, asked: list[tuple[EditEvent, tuple[Question, ...]]], lacks: frozenset[str]) -> None:
    given: set[str] = set()
    for event, questions in asked:
        paraphrases = stream.paraphrases(event)
        assert not {normalize(p) for p in paraphrases} & {normalize(q.prompt) for q in questions}
        given |= set(paraphrases)
    held_out = {q.prompt for _, questions in asked for q in questions if q.split == "text_generality"}
    assert (not given) == ("paraphrases" in lacks)
    assert not given & held_out


def test_the_editors_view_holds_no_question(stream: Stream, asked: list[tuple[EditEvent, tuple[Question, ...]]]) -> None:
    for event, questions in asked[:100]:
        batch = EditBatch((event,), 1, {event.id: stream.paraphrases(event)})
        seen = {t for e in batch.events for t in texts([getattr(e, f) for f in e.__dataclass_fields__])}
        seen |= set(texts(dict(batch.paraphrases)))
        assert event.prompt in seen
        assert not (seen - {event.prompt}) & {q.prompt for q in questions}
        assert not seen & {q.id for q in questions}


def test_locality_and_general_facts_are_never_edited(stream: Stream, asked: list[tuple[EditEvent, tuple[Question, ...]]]) -> None:
    edited = {question_key(e) for e in stream.events(3 * N)}
    local = {question_key(q) for _, questions in asked for q in questions if q.split in LOCALITY_SPLITS}
    assert local
    assert not local & edited
    assert not {question_key(q) for q in stream.general()} & edited


def test_a_leak_into_locality_would_show(asked: list[tuple[EditEvent, tuple[Question, ...]]]) -> None:
    """A locality question whose right answer were the edit's target could not tell a leak from a hit."""
    answered = [(e, q) for e, questions in asked for q in questions if q.split == "locality_hard" and q.answer is not None]
    hidden = [q for e, q in answered if q.answer == e.target]
    assert len(hidden) <= 0.05 * len(answered)


def test_the_train_pool_is_asked_by_no_probe(stream: Stream, asked: list[tuple[EditEvent, tuple[Question, ...]]]) -> None:
    pool = {question_key(q) for q in stream.train_pool().questions}
    probes = {question_key(q) for _, questions in asked for q in questions} | {question_key(q) for q in stream.general()}
    assert pool
    assert not pool & probes
    assert not pool & {question_key(e) for e in stream.events(3 * N)}


def test_the_train_edits_touch_no_edit_and_no_question(make: Make, stream: Stream) -> None:
    """Every stream has some, of entities, pictures and prompts that no edit and no question of it has."""
    the_train_edits_touch_no_edit_and_no_question(StreamCase(make))
    edits = stream.train_pool().edits
    assert edits and len({e.event.id for e in edits}) == len(edits)
    assert any(e.rephrasings or e.locality for e in edits)


def test_general_questions_have_topics_and_answers(stream: Stream) -> None:
    general = stream.general()
    assert general
    assert {q.split for q in general} <= {"general", "text"}
    assert all(q.topic and q.event_id is None for q in general)
    assert len({q.id for q in general}) == len(general)


def test_beliefs_do_not_contradict_each_other(stream: Stream) -> None:
    answers: dict[tuple[str, str], str | None] = {}
    for q in stream.beliefs():
        assert answers.setdefault(question_key(q), q.answer) == q.answer
    assert len(answers) > 50
    first = [e for e in stream.events(N) if e.kind == "add"]
    assert any(answers.get(question_key(e)) == e.previous for e in first)


def test_pictures_load(stream: Stream, asked: list[tuple[EditEvent, tuple[Question, ...]]]) -> None:
    pictures = {key(q.image): q.image for _, questions in asked[:3] for q in questions if q.image is not None}
    for name, picture in pictures.items():
        pixels = picture.load()
        assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3), name
        assert np.array_equal(pixels, picture.load())
    assert (asked[0][0].image is None) or pictures


def test_no_global_generator_is_touched(make: Make) -> None:
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    s = make(seed=3)
    for event in s.events(30):
        s.questions(event)
        s.paraphrases(event)
    s.general(), s.train_pool()
    after = random.getstate(), np.random.get_state()  # noqa: NPY002
    assert before[0] == after[0]
    assert str(before[1]) == str(after[1])


def test_two_thousand_edits_are_in_order(stream: Stream) -> None:
    events = stream.events(2000)
    check_order(events)
    assert all(stream.questions(event) for event in events[::40])
    assert stream.time_axis != "simulated" or len(events) == 2000


def test_a_foreign_event_is_refused(stream: Stream) -> None:
    foreign_event = EditEvent("add", 1.0, 0, "Who is it?", "nobody", source="elsewhere")
    with pytest.raises(BadStream):
        stream.questions(foreign_event)


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
