"""The simulated world: deterministic, prefix-stable, and exact about what no edit touches."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.base import BadStream, StreamConfig
from streams.world.emblem import PARTS, Code, Photo, change_part, random_code
from streams.world.facts import World, world
from streams.world.stream import FORMS, WorldStream
from streams.world.words import KINDS, RELATIONS, SLOTS, canonical, phrasings
from testbed.core.events import LOCALITY_SPLITS, EditEvent, Picture, Question, check_order
from testbed.core.registry import STREAMS

SIZE = 100
forms = st.sampled_from(sorted(FORMS))
seeds = st.integers(0, 10_000)
few = settings(max_examples=15, deadline=None)


def make(form: str = "okedit", **changes) -> WorldStream:
    return WorldStream(StreamConfig(world_size=SIZE, **changes), form=form)


def facts_of_prompts(stream: WorldStream) -> dict[tuple[str, str | None], tuple[str, str]]:
    """(prompt, emblem) of every canonical question, to the fact that it asks for."""
    out = {}
    for fact in stream.world.facts():
        prompt, photo = stream.maker.edit_prompt(fact)
        out[prompt, emblem(photo)] = (fact.entity.name, fact.relation.name)
    return out


def emblem(photo: Picture | None) -> str | None:
    return None if photo is None else photo.key.rsplit("-", 1)[0]


@few
@given(forms, seeds, st.integers(0, 120), st.integers(0, 120))
def test_the_first_events_do_not_depend_on_how_many_are_taken(form, seed, few_events, more):
    short, long = make(form, seed=seed), make(form, seed=seed)
    a, b = short.events(few_events), long.events(few_events + more)
    assert a == b[:few_events]
    assert short.events(few_events + more) == b
    check_order(b)


@few
@given(forms, seeds)
def test_events_chain_values_and_start_at_year_one(form, seed):
    events = make(form, seed=seed, edits_per_year=30, retire=0.1, revert=0.1).events(300)
    now: dict[tuple[str, str], tuple[EditEvent, str]] = {}
    start: dict[tuple[str, str], str] = {}
    for e in events:
        if e.fact in now:
            last, value = now[e.fact]
            assert e.revises == last.id and e.previous == value and e.kind != "add"
        else:
            assert e.kind == "add" and e.revises is None
            start[e.fact] = e.previous or ""
        assert e.target != e.previous
        now[e.fact] = (e, start[e.fact] if e.kind == "retire" else e.target)
    assert events[0].time == 1.0 and events[29].year == 1 and events[30].year == 2
    assert {e.kind for e in events} >= {"add", "revise", "revert", "retire"}


@few
@given(forms, seeds)
def test_locality_asks_only_for_facts_that_no_event_changes(form, seed):
    stream = make(form, seed=seed)
    events = stream.events(250)
    edited, asked_of = {e.fact for e in events}, facts_of_prompts(stream)
    for e in events[:60]:
        for q in stream.questions(e):
            if q.split in LOCALITY_SPLITS and q.topic != "arithmetic":
                fact = asked_of.get((q.prompt, emblem(q.image)))
                assert q.answer and (fact is None or fact not in edited), q


@few
@given(forms, seeds)
def test_questions_have_unique_ids_and_no_prompt_of_the_train_pool(form, seed):
    stream = make(form, seed=seed)
    questions = [q for e in stream.events(80) for q in stream.questions(e)]
    assert len({q.id for q in questions}) == len(questions)
    for e in stream.events(80):
        mine = [q.prompt for q in questions if q.event_id == e.id]
        assert mine and not set(stream.paraphrases(e)) & set(mine)
        assert e.prompt not in stream.paraphrases(e)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_an_event_has_questions_of_every_split_of_its_form(form):
    stream = make(form)
    e = next(e for e in stream.events(50) if any(q.split == "portability" for q in stream.questions(e)))
    by_split = Counter(q.split for q in stream.questions(e))
    portability = by_split.pop("portability")
    expected = {"edit": 1, "text_generality": 2, "stale": 1, **dict.fromkeys(LOCALITY_SPLITS, 1)}
    if FORMS[form].pictures:
        expected |= {"image_generality": FORMS[form].new_photos}
        assert portability == 1
    assert by_split == expected
    answers = {q.split: q.answer for q in stream.questions(e)}
    assert answers["edit"] == e.target and answers["stale"] == e.previous
    assert all(q.image is None for q in stream.questions(e)) is (not FORMS[form].pictures)


def test_two_hops_are_true_after_the_edit_and_were_not_before():
    """Facts kept in a plain dictionary and changed as events say, hops walked by the words of the prompts."""
    stream = make("text", retire=0.1, revise=0.3)
    world = stream.world
    facts = {(f.entity.name, f.slot): f.value for f in world.facts()}
    slots = {(f.entity.kind, f.relation.name): f.slot for f in world.facts()}

    def walk(prompt: str) -> set[str]:
        out = set()
        for entity in world.entities:
            for relation in {r for e in world.entities for r in e.relations}:
                middle = world.by_name[facts[entity.name, 3]]
                slot = slots.get((middle.kind, relation.name))
                link = f"the {entity.relations[3].nouns[0]} of {entity.name}"
                if entity.name in prompt and slot is not None and prompt == canonical(relation, link):
                    out.add(facts[middle.name, slot])
        return out

    topics = Counter()
    for e in stream.events(60):
        asked = [q for q in stream.questions(e) if q.split == "portability"]
        before = [walk(q.prompt) for q in asked]
        change = stream._change(e)
        facts[change.fact.entity.name, change.fact.slot] = change.value
        for q, old in zip(asked, before, strict=True):
            assert walk(q.prompt) == {q.answer} and q.answer not in old, q
            topics[q.topic] += 1
    assert topics["hop_first"] > 5 and topics["hop_second"] > 5


def test_after_a_retire_the_answer_is_the_one_before_any_edit():
    stream = make(retire=0.3, revise=0.1)
    events = stream.events(200)
    first = {e.fact: e.previous for e in events if e.kind == "add"}
    retired = [e for e in events if e.kind == "retire"]
    assert len(retired) > 20
    for e in retired:
        assert e.target == ""
        assert next(q.answer for q in stream.questions(e) if q.split == "edit") == first[e.fact]


def test_some_changes_cause_another_of_the_same_entity():
    events = make().events(400)
    following = [(a, b) for a, b in pairwise(events) if "follows from" in b.source]
    assert len(following) > 10
    assert all(a.subject == b.subject and a.relation != b.relation and a.id in b.source for a, b in following)


def test_another_seed_is_another_history_of_the_same_world():
    a, b = make(seed=1), make(seed=2)
    assert a.data_hash() == b.data_hash() != make(world_seed=1).data_hash()
    assert a.stream_hash(a.events(50)) != b.stream_hash(b.events(50))
    assert a.stream_hash(a.events(50)) == make(seed=1).stream_hash(make(seed=1).events(50))


def test_ten_thousand_edits_come_without_an_end():
    stream = WorldStream(StreamConfig(edits_per_year=1000))
    events = stream.events(10_000)
    check_order(events)
    kinds = Counter(e.kind for e in events)
    assert len(events) == 10_000 and kinds["add"] == 3 * 480
    assert events[-1].year == 10


def test_hard_locality_shows_an_emblem_that_differs_in_one_part():
    stream = make()
    twins = 0
    for e in stream.events(150):
        hard = next(q for q in stream.questions(e) if q.split == "locality_hard")
        entity = stream.world.by_name[e.subject or ""]
        assert isinstance(hard.image, Photo) and hard.prompt == e.prompt
        apart = sum(a != b for a, b in zip(entity.code, hard.image.code, strict=True))
        assert apart == 1 if hard.topic == "twin" else apart >= 1
        twins += hard.topic == "twin"
    assert twins > 40


def test_the_panel_and_the_train_pool_ask_for_unedited_facts_of_different_entities():
    stream = make()
    panel, pool = stream.general(), stream.train_pool()
    topics = Counter(q.topic for q in panel)
    assert set(topics) >= {"perception", "arithmetic", "comparison", "grammar", "facts", "facts_by_picture", "two_hop", "running_text"}
    assert all(q.split == "text" for q in panel if q.topic == "running_text")
    names = {e.name for e in stream.world.controls()}
    in_panel, in_pool = ({n for n in names for q in qs if q.split == "general" and n in q.prompt} for qs in (panel, pool.questions))
    assert in_panel and in_pool and not in_panel & in_pool
    assert not {q.prompt for q in panel} & set(pool.texts)
    assert pool.texts


def test_two_hop_answers_follow_two_facts():
    stream = make()
    w = stream.world
    for q in (q for q in stream.general() if q.topic.startswith("two_hop")):
        name = next(n for n in w.by_name if f" {n}?" in q.prompt or f" {n} " in q.prompt)
        middle = w.by_name[w.value(w.by_name[name], SLOTS - 1)]
        assert q.answer in {w.value(middle, s) for s in middle.frozen}


def test_beliefs_are_the_values_at_the_start():
    stream = make("text")
    beliefs = {q.prompt: q.answer for q in stream.beliefs()}
    assert len(beliefs) == SIZE * SLOTS
    for e in stream.events(100):
        if e.kind == "add":
            assert beliefs[e.prompt] == e.previous


def test_a_fifth_of_the_entities_are_controls_and_every_other_has_a_frozen_relation():
    w = World(3, 200)
    assert len(w.controls()) == 40
    assert all(len(e.frozen) == (SLOTS if e.control else 1) for e in w.entities)
    assert len({e.code for e in w.entities}) == len({e.name for e in w.entities}) == 200


@given(st.integers(0, 2**31 - 1))
@few
def test_a_photo_is_the_same_for_the_same_key_and_new_for_a_new_number(seed):
    code = random_code(np.random.default_rng(seed))
    photo = Photo(code, seed)
    assert isinstance(photo, Picture)
    first = photo.load()
    assert first.shape == (48, 48, 3) and first.dtype == np.uint8
    assert np.array_equal(first, Photo(code, seed).load())
    assert not np.array_equal(first, Photo(code, seed + 1).load())
    assert photo.key != Photo(code, seed + 1).key


@given(st.integers(0, 2**31 - 1))
@few
def test_changing_a_part_changes_one_part_and_keeps_two_colours(seed):
    rng = np.random.default_rng(seed)
    code = random_code(rng)
    other = change_part(code, rng)
    assert sum(a != b for a, b in zip(code, other, strict=True)) == 1
    assert other.field != other.second and set(other.words()) == set(PARTS)


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_held_out_paraphrases_are_disjoint(kind):
    for relation in RELATIONS[kind]:
        train, held = (set(phrasings(relation, "it", h)) for h in (False, True))
        assert len(train) == 16 and len(held) == 8
        assert not train & held and canonical(relation, "it") not in train | held


@pytest.mark.parametrize(
    ("config", "form", "said"),
    [
        (StreamConfig(world_size=150), None, "multiple of 20"),
        (StreamConfig(world_seed=-1), None, "0 or more"),
        (StreamConfig(), "poem", "okedit"),
    ],
)
def test_a_world_that_cannot_be_made_is_refused(config, form, said):
    with pytest.raises(BadStream, match=said):
        WorldStream(config, form)


def test_an_event_of_another_stream_is_refused():
    foreign = make("text", seed=5).events(3)[2]
    with pytest.raises(BadStream, match=foreign.id):
        make("text", seed=6).questions(foreign)


@pytest.mark.parametrize("name", ["mmedit-yearly", "mmedit-caption-yearly", "okedit-yearly"])
def test_streams_of_files_come_from_the_world_without_files(name):
    stream = STREAMS.get(name)(StreamConfig(world_size=SIZE))
    assert isinstance(stream.events(1)[0].image, Photo) and stream.data_hash() == world(0, SIZE).content_hash()


def test_the_world_needs_no_torch():
    code = (
        "import streams.world.stream, sys; from streams.base import StreamConfig; "
        "streams.world.stream.WorldYearly(StreamConfig()).events(9); print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_captions_name_the_entity_and_who_is_in_charge():
    stream = make("caption")
    e = stream.events(1)[0]
    assert e.prompt == "Describe this emblem in one sentence."
    assert e.subject and e.subject in e.target and e.target != e.previous
    assert isinstance(stream.questions(e)[0], Question) and isinstance(Code(*stream.world.entities[0].code), Code)
