"""The contract of a stream as checks. tests/streams/test_streams.py runs them on every registered stream."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from streams.base import BadStream, Stream, question_key, shared_answers, touches
from streams.files.records import normalize
from testbed.checks.contract import refused, require
from testbed.core.events import LOCALITY_SPLITS, EditBatch, EditEvent, Question, check_order

N = 300
"""Edits that are looked at."""


@dataclass(frozen=True)
class StreamCase:
    """One stream; make: a fresh instance with these fields of its configuration."""

    make: Callable[..., Stream]

    @cached_property
    def stream(self) -> Stream:
        return self.make()

    @cached_property
    def asked(self) -> list[tuple[EditEvent, tuple[Question, ...]]]:
        return [(e, self.stream.questions(e)) for e in self.stream.events(N)]


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


def the_manifest_describes_the_stream(case: StreamCase) -> None:
    stream = case.stream
    require(stream.summary and "\n" not in stream.summary, f"summary must be one line, it is {stream.summary!r}")
    require(stream.time_axis in ("dated", "scheduled", "simulated"), f"time_axis is {stream.time_axis!r}")
    require(("simulated" in stream.origin) == (stream.time_axis == "simulated"), f"origin {stream.origin!r} and time_axis disagree")
    manifest = json.loads(json.dumps(stream.manifest()))
    told = manifest["time_axis"], manifest["origin"], bool(manifest["licence"])
    require(told == (stream.time_axis, stream.origin, True), f"the manifest says {told}")


def events_are_in_order_of_time_and_years_are_full(case: StreamCase) -> None:
    events = case.stream.events(N)
    require(0 < len(events) <= N, f"events({N}) gives {len(events)} events")
    check_order(events)
    year = case.stream.config.edits_per_year
    if case.stream.time_axis != "dated":
        require(events[0].year == 1, f"the first year is {events[0].year}, not 1")
        first = [e.year for e in events].count(1)
        require(first == min(year, len(events)), f"the first year has {first} edits, not {year}")


def the_same_events_come_twice(case: StreamCase) -> None:
    one, two = case.make(), case.make()
    require(one.stream_hash(one.events(N)) == two.stream_hash(two.events(N)), "two instances give other events")
    require(one.data_hash() == two.data_hash(), "two instances have other data hashes")
    require([q.id for q in one.general()] == [q.id for q in two.general()], "two instances give other general questions")
    event = one.events(20)[-1]
    require([q.id for q in one.questions(event)] == [q.id for q in two.questions(event)], "two instances ask otherwise about an edit")


def the_first_events_do_not_depend_on_how_many(case: StreamCase) -> None:
    whole = case.make().events(N)
    for k in (0, 1, 37, 150):
        short = case.make()
        require(short.events(k) == whole[:k], f"events({k}) are not the first {k} of events({N})")
        require(short.events(N) == whole, f"events({N}) depend on an earlier call of events({k})")


def a_drifting_stream_keeps_the_contract(case: StreamCase) -> None:
    one, two = case.make(drift=True), case.make(drift=True)
    check_order(one.events(N))
    require(two.events(40) == one.events(N)[:40], "with stream.drift the first events depend on how many are taken")


def another_seed_is_another_order_of_the_same_data(case: StreamCase) -> None:
    one, two = case.make(seed=0), case.make(seed=1)
    require(one.data_hash() == two.data_hash(), "the data hash depends on the seed")
    if one.time_axis == "dated":  # the seed orders changes of one date only
        every = [{e.id for e in s.events(10**6)} for s in (one, two)]
        require(every[0] == every[1], "a dated stream has the same changes under every seed")
        return
    require([e.id for e in one.events(50)] != [e.id for e in two.events(50)], "two seeds give the same order")


def a_change_starts_from_the_value_before_it(case: StreamCase) -> None:
    by_id: dict[str, EditEvent] = {}
    for e in case.stream.events(N):
        if e.revises:
            before = by_id[e.revises]
            require(before.fact == e.fact, f"edit {e.id} revises one of another fact")
            require(
                before.kind == "retire" or e.previous == before.target, f"edit {e.id} starts from {e.previous!r}, not {before.target!r}"
            )
        require(e.target != e.previous, f"edit {e.id} changes nothing: {e.target!r}")
        by_id[e.id] = e
    replaced = [e.revises for e in by_id.values() if e.revises]
    require(len(set(replaced)) == len(replaced), "an edit is revised by two others")


def questions_belong_to_their_event(case: StreamCase) -> None:
    ids: set[str] = set()
    for event, questions in case.asked:
        require(all(q.event_id == event.id for q in questions), f"a question about {event.id} names another edit")
        require(not ids & {q.id for q in questions}, f"a question about {event.id} has the id of another question")
        ids |= {q.id for q in questions}
        edit = [q for q in questions if q.split == "edit"]
        require([question_key(q) for q in edit] == [question_key(event)], f"the split edit of {event.id} is not its own prompt and picture")
        require(event.kind == "retire" or edit[0].answer == event.target, f"the answer to {event.id} is {edit[0].answer!r}, not its target")


def stale_answers_are_the_previous_value(case: StreamCase) -> None:
    stale = [(e, q) for e, questions in case.asked for q in questions if q.split == "stale"]
    changed = len([e for e, _ in case.asked if e.previous is not None])
    require(len(stale) == changed, f"{changed} edits replace a value, and {len(stale)} stale questions ask for it")
    for event, question in stale:
        require(question.answer == event.previous, f"the stale answer of {event.id} is {question.answer!r}, not {event.previous!r}")
        require(event.target not in question.golds, f"the stale question of {event.id} takes the new answer")
        require(question_key(question) == question_key(event), f"the stale question of {event.id} is another one")


def paraphrases_are_not_asked(case: StreamCase) -> None:
    given: set[str] = set()
    for event, questions in case.asked:
        paraphrases = case.stream.paraphrases(event)
        both = {normalize(p) for p in paraphrases} & {normalize(q.prompt) for q in questions}
        require(not both, f"what an editor may learn from is asked: {sorted(both)[:1]}")
        given |= set(paraphrases)
    held_out = {q.prompt for _, questions in case.asked for q in questions if q.split == "text_generality"}
    require(not given & held_out, f"a paraphrase of one edit is asked about another: {sorted(given & held_out)[:1]}")


def the_editors_view_holds_no_question(case: StreamCase) -> None:
    for event, questions in case.asked[:100]:
        batch = EditBatch((event,), 1, {event.id: case.stream.paraphrases(event)})
        seen = {t for e in batch.events for t in texts([getattr(e, f) for f in e.__dataclass_fields__])} | set(
            texts(dict(batch.paraphrases))
        )
        leaked = (seen - {event.prompt}) & {q.prompt for q in questions}
        require(not leaked, f"an editor sees a question: {sorted(leaked)[:1]}")
        require(not seen & {q.id for q in questions}, "an editor sees the id of a question")


def locality_and_general_facts_are_never_edited(case: StreamCase) -> None:
    edited = {question_key(e) for e in case.stream.events(3 * N)}
    local = {question_key(q) for _, questions in case.asked for q in questions if q.split in LOCALITY_SPLITS}
    require(local, "no edit has a question about locality")
    require(not local & edited, f"a locality question is edited: {sorted(local & edited)[:1]}")
    general = {question_key(q) for q in case.stream.general()}
    require(not general & edited, f"a general question is edited: {sorted(general & edited)[:1]}")


def a_leak_into_locality_would_show(case: StreamCase) -> None:
    """A locality question whose right answer were the edit's target could not tell a leak from a hit."""
    answered = [(e, q) for e, questions in case.asked for q in questions if q.split == "locality_hard" and q.answer is not None]
    hidden = len([q for e, q in answered if q.answer == e.target])
    require(hidden <= 0.05 * len(answered), f"the answer of {hidden} of {len(answered)} hard locality questions is the edit's target")


def the_train_pool_is_asked_by_no_probe(case: StreamCase) -> None:
    pool = {question_key(q) for q in case.stream.train_pool().questions}
    probes = {question_key(q) for _, questions in case.asked for q in questions} | {question_key(q) for q in case.stream.general()}
    require(not pool & probes, f"a question of the train pool is asked: {sorted(pool & probes)[:1]}")
    edited = {question_key(e) for e in case.stream.events(3 * N)}
    require(not pool & edited, f"a question of the train pool is edited: {sorted(pool & edited)[:1]}")


def the_train_edits_touch_no_edit_and_no_question(case: StreamCase) -> None:
    """No entity, no picture and no question of the stream is among the edits that methods may learn to edit from; answers may be."""
    events, edits = case.stream.events(3 * N), case.stream.train_pool().edits
    questions = [*case.stream.general(), *(q for _, qs in case.asked for q in qs)]
    touching = touches(edits, events, questions)
    require(not touching, f"{len(touching)} train edits touch the stream: {'; '.join(touching[:3])}")
    idle = [e.event.prompt for e in edits if e.event.target == e.event.previous]
    require(not idle, f"{len(idle)} train edits change nothing: {idle[:1]}")
    require(not edits or "train edits share no subject" in shared_answers(edits, events), "the answers that both share are not counted")


def general_questions_have_topics(case: StreamCase) -> None:
    general = case.stream.general()
    splits = {q.split for q in general}
    require(splits <= {"general", "text"}, f"general questions have the splits {sorted(splits)}")
    require(all(q.topic and q.event_id is None for q in general), "a general question lacks its topic, or names an edit")
    require(len({q.id for q in general}) == len(general), "two general questions have one id")


def beliefs_do_not_contradict_each_other(case: StreamCase) -> None:
    answers: dict[tuple[str, str], str | None] = {}
    for q in case.stream.beliefs():
        known = answers.setdefault(question_key(q), q.answer)
        require(known == q.answer, f"{q.prompt!r} has the answers {known!r} and {q.answer!r}")


def pictures_load(case: StreamCase) -> None:
    shown = {q.image.key: q.image for _, questions in case.asked[:3] for q in questions if q.image is not None}
    for name, picture in shown.items():
        pixels = picture.load()
        found = pixels.dtype, pixels.shape
        require(pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, f"{name} is {found}, not uint8 (height, width, 3)")
        require(np.array_equal(pixels, picture.load()), f"{name} loads otherwise the second time")


def no_global_generator_is_touched(case: StreamCase) -> None:
    before = random.getstate(), str(np.random.get_state())  # noqa: NPY002
    stream = case.make(seed=3)
    for event in stream.events(30):
        stream.questions(event)
        stream.paraphrases(event)
    stream.general()
    stream.train_pool()
    after = random.getstate(), str(np.random.get_state())  # noqa: NPY002
    require(before == after, "the stream draws from a global generator: make one of its seed")


def a_foreign_event_is_refused(case: StreamCase) -> None:
    with refused(BadStream, ""):
        case.stream.questions(EditEvent("add", 1.0, 0, "Who is it?", "nobody", source="elsewhere"))


CHECKS: tuple[Callable[[StreamCase], None], ...] = (
    the_manifest_describes_the_stream,
    events_are_in_order_of_time_and_years_are_full,
    the_same_events_come_twice,
    the_first_events_do_not_depend_on_how_many,
    a_drifting_stream_keeps_the_contract,
    another_seed_is_another_order_of_the_same_data,
    a_change_starts_from_the_value_before_it,
    questions_belong_to_their_event,
    stale_answers_are_the_previous_value,
    paraphrases_are_not_asked,
    the_editors_view_holds_no_question,
    locality_and_general_facts_are_never_edited,
    a_leak_into_locality_would_show,
    the_train_pool_is_asked_by_no_probe,
    the_train_edits_touch_no_edit_and_no_question,
    general_questions_have_topics,
    beliefs_do_not_contradict_each_other,
    pictures_load,
    no_global_generator_is_touched,
    a_foreign_event_is_refused,
)
"""Every check of a stream, in the order in which they are told."""
