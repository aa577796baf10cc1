"""Made-up classes of the simulated world: membership follows from the definition that holds and from facts that never change."""

from __future__ import annotations

from pathlib import Path

import pytest

from streams.base import BadStream, StreamConfig
from streams.files.concepts import DEMONSTRATIONS
from streams.world.concepts import SLOT, WorldConcepts
from streams.world.facts import world
from streams.world.words import canonical
from testbed.core.events import EditEvent
from testbed.core.registry import STREAMS

CARD = Path(__file__).parents[2] / "streams" / "cards" / "world-concepts-yearly.md"
INSTANCES = ("instance_follow", "instance_stay")


@pytest.fixture(scope="module")
def stream() -> WorldConcepts:
    return STREAMS.get("world-concepts-yearly")(StreamConfig())


def instances(stream: WorldConcepts, event: EditEvent, split: str) -> dict[str, str | None]:
    """The entities that are asked, with the right answers."""
    asked = [q for q in stream.questions(event) if q.split == split]
    return {q.prompt.removeprefix(DEMONSTRATIONS).split()[1]: q.answer for q in asked}


def test_membership_is_what_the_definition_and_the_facts_say(stream: WorldConcepts) -> None:
    made, first = world(0, 0), {e.subject: e.previous or "" for e in stream.events(10**6) if e.kind == "add"}
    for event in stream.events(10**6)[::5]:
        definition = event.target or first[event.subject]
        for split in INSTANCES:
            for name, answer in instances(stream, event, split).items():
                entity = made.by_name[name]
                value = made.value(entity, SLOT)
                now, before = (value in d and f" is a {entity.kind} " in d for d in (definition, first[event.subject]))
                assert (answer == "Yes") == now and (split == "instance_follow") == (now != before)


def test_two_leave_two_join_and_four_stay(stream: WorldConcepts) -> None:
    added = [e for e in stream.events(300) if e.kind == "add"]
    answers = [sorted(a or "" for a in instances(stream, e, s).values()) for e in added for s in INSTANCES]
    whole = [a for a in answers if a == ["No", "No", "Yes", "Yes"]]
    assert len(whole) > 0.8 * len(answers) and all({"No", "Yes"} == set(a) for a in answers)


def test_after_a_retirement_every_instance_is_as_before_any_edit(stream: WorldConcepts) -> None:
    retired = next(e for e in stream.events(10**6) if e.kind == "retire")
    beliefs = {q.prompt: q.answer for q in stream.beliefs()}
    assert not instances(stream, retired, "instance_follow")
    for q in stream.questions(retired):
        assert q.split != "instance_stay" or q.answer == beliefs[q.prompt]


def test_the_facts_of_instances_are_beliefs_and_siblings(stream: WorldConcepts) -> None:
    made, beliefs = world(0, 0), {q.prompt: q.answer for q in stream.beliefs()}
    event = stream.events(1)[0]
    siblings = {q.prompt: q.answer for q in stream.questions(event) if q.split == "locality_sibling"}
    leaving = [made.by_name[n] for n, answer in instances(stream, event, "instance_follow").items() if answer == "No"]
    assert siblings == {canonical(e.relations[SLOT], e.name): made.value(e, SLOT) for e in leaving}
    assert all(beliefs[prompt] == answer for prompt, answer in siblings.items())


def test_the_card_says_what_there_is(stream: WorldConcepts) -> None:
    assert stream.origin == "definitions of 240 made-up classes in world 0 (600 entities), 42 of them never edited"
    assert f"| 0 | 240 | 42 | {len(stream.events(10**6)):,} |" in CARD.read_text(encoding="utf-8")


def test_a_small_world_has_fewer_instances_and_another_size_is_refused() -> None:
    assert STREAMS.get("world-concepts-yearly")(StreamConfig(world_size=20)).events(100)
    with pytest.raises(BadStream, match="the simulated world cannot be made: world_size must be a multiple of 20"):
        STREAMS.get("world-concepts-yearly")(StreamConfig(world_size=7))
