"""Documents about the simulated world's entities: two facts of four change, the others stay, at every version."""

from __future__ import annotations

from pathlib import Path

import pytest

from streams.base import BadStream, StreamConfig
from streams.world.documents import WorldDocuments
from testbed.core.events import EditEvent
from testbed.core.registry import STREAMS

CARD = Path(__file__).parents[2] / "streams" / "cards" / "world-documents-yearly.md"


@pytest.fixture(scope="module")
def stream() -> WorldDocuments:
    return STREAMS.get("world-documents-yearly")(StreamConfig())


def sentences(document: str | None) -> list[str]:
    return (document or "").rstrip(".").split(". ")


def asked(stream: WorldDocuments, event: EditEvent, split: str) -> set[str]:
    return {q.answer or "" for q in stream.questions(event) if q.split == split}


def test_two_facts_of_four_change_in_one_edit(stream: WorldDocuments) -> None:
    for e in (e for e in stream.events(200) if e.kind == "add"):
        before, after = sentences(e.previous), sentences(e.target)
        assert len(before) == len(after) == 5
        assert sum(a != b for a, b in zip(before, after)) == 2


def test_sub_questions_ask_for_the_present_values_and_siblings_for_those_that_stay(stream: WorldDocuments) -> None:
    events = stream.events(10**6)
    assert {"add", "revise", "revert", "retire"} == {e.kind for e in events}
    for e in events[::7]:
        document = e.target or asked(stream, e, "edit").pop()
        changed, kept = asked(stream, e, "sub_question"), asked(stream, e, "locality_sibling")
        assert len(changed) == len(kept) == 2
        assert all(f" is {value}." in document for value in changed | kept)
        assert all(f" is {value}." in (e.previous or "") for value in kept)
        assert not any(f" is {value}." in (e.previous or "") for value in changed)


def test_what_stays_is_the_same_in_every_version(stream: WorldDocuments) -> None:
    first: dict[str, set[str]] = {}
    for e in stream.events(10**6):
        assert asked(stream, e, "locality_sibling") == first.setdefault(e.subject or "", asked(stream, e, "locality_sibling"))


def test_the_card_says_what_there_is(stream: WorldDocuments) -> None:
    assert stream.origin == "documents about 600 made-up entities of world 0, 120 of them never edited"
    assert f"| 0 | 600 | 120 | {len(stream.events(10**6)):,} |" in CARD.read_text(encoding="utf-8")


def test_a_world_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(BadStream, match="the simulated world cannot be made: world_size must be a multiple of 20"):
        STREAMS.get("world-documents-yearly")(StreamConfig(world_size=7))
