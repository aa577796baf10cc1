"""The fact store against a plain dictionary of which every step has a copy."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from testbed.core.events import BadEvent, EditEvent
from testbed.editors.retrieval.fact_store import FactStore, Version

NAMES = st.sampled_from("abcd")


def event(name: str, target: str, number: int, revises: str | None = None) -> EditEvent:
    kind = "revise" if revises else "add"
    return EditEvent(kind, 1.0, number, f"who is {name}?", target, revises=revises, source=str(number))


def alive_at(store: FactStore, step: int) -> list[Version]:
    return [v for v, alive in zip(store.log, store.alive(step)) if alive]


class StoreMachine(RuleBasedStateMachine):
    """In the plain model each fact is a list of values, of which the last one holds."""

    def __init__(self) -> None:
        super().__init__()
        self.store = FactStore()
        self.values: dict[str, list[tuple[str, str]]] = {}
        self.number, self.step = 0, 0
        self.past: dict[int, dict[str, str]] = {}

    def _add(self, name: str, revises: str | None) -> None:
        self.number += 1
        e = event(name, f"t{self.number}", self.number, revises)
        self.store.add(e, self.step)
        self.values.setdefault(name, []).append((e.id, e.target))

    @rule()
    def next_step(self) -> None:
        self.past[self.step] = self.now()
        self.step += 1

    @rule(name=NAMES)
    def state(self, name: str) -> None:
        self._add(name, None)

    @rule(data=st.data())
    def revise(self, data: st.DataObject) -> None:
        held = sorted(n for n, v in self.values.items() if v)
        if held:
            name = data.draw(st.sampled_from(held))
            self._add(name, self.values[name][-1][0])

    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        held = sorted(n for n, v in self.values.items() if v)
        if held:
            values = self.values[data.draw(st.sampled_from(held))]
            gone = values.pop(data.draw(st.integers(0, len(values) - 1)))
            self.store.withdraw(gone[0], self.step)
            with pytest.raises(KeyError):
                self.store.withdraw(gone[0], self.step)

    @rule()
    def store_and_load(self) -> None:
        rows = [list(v) for v in self.store.log]
        self.store = FactStore((Version(*row) for row in rows), {int(k): v for k, v in self.store.gone.items()})

    def now(self) -> dict[str, str]:
        return {n: v[-1][1] for n, v in self.values.items() if v}

    @invariant()
    def every_past_step_is_known(self) -> None:
        for step, held in {**self.past, self.step: self.now()}.items():
            versions = alive_at(self.store, step)
            assert {v.prompt.removeprefix("who is ").rstrip("?"): v.target for v in versions} == held
            assert len(versions) == len(held)
        assert np.array_equal(self.store.alive(), self.store.alive(self.step))

    @invariant()
    def the_newest_version_is_found_from_any_of_its_events(self) -> None:
        alive = self.store.alive()
        for name, values in self.values.items():
            for i, _ in values:
                rows = self.store.rows_with(i)
                assert [self.store.log[row].target for row in rows if alive[row]] == [self.now()[name]]
                assert rows == sorted(rows)


StoreMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestStore = StoreMachine.TestCase


def test_an_unknown_event_cannot_be_withdrawn():
    with pytest.raises(KeyError):
        FactStore().withdraw("nobody", 1)
    assert FactStore().rows_with("nobody") == []


def test_a_revision_with_another_prompt_changes_the_same_fact():
    store = FactStore()
    first = event("a", "x", 0)
    store.add(first, 1)
    store.add(event("b", "y", 1, first.id), 2)
    assert [[v.target for v in alive_at(store, step)] for step in (0, 1, 2)] == [[], ["x"], ["y"]]


@pytest.mark.parametrize(("prompt", "target"), [("", "x"), ("who?", " ")])
def test_an_empty_fact_cannot_be_stated(prompt, target):
    with pytest.raises(BadEvent, match="not empty"):
        EditEvent("add", 1.0, 0, prompt, target)


def test_bytes_count_every_text():
    store = FactStore()
    store.add(event("ü", "x", 0), 1)
    v = store.log[0]
    assert store.bytes == sum(len(t.encode()) for t in (v.event_id, v.prompt, v.target, v.key))
