"""Any sequence of operations on a codebook agrees with the quadratic reference implementation, and with its own past."""

from __future__ import annotations

import json
import math
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from testbed.editors.codebook.codebook import Codebook
from testbed.editors.codebook.gate import Gate
from testbed.model.encoding import Batch
from tests.reference.codebook import EXAMPLES, ReferenceCodebook, Row, add, grid, hits, labels, queries, radii

sizes = st.integers(0, 5)


class Machine(RuleBasedStateMachine):
    @initialize(how=st.sampled_from(["nearest-then-check", "containing-nearest"]), nulls=st.lists(grid, max_size=3))
    def begin(self, how: Any, nulls: list) -> None:
        self.reference = ReferenceCodebook(how, nulls)
        self.book = Codebook(3, rule=how, nulls=torch.tensor(nulls, dtype=torch.float).reshape(-1, 3))
        self.past: list[list[Row]] = [[]]
        self.handed: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.count = 0

    def _add(self, row: Row) -> None:
        rivals = [r.id for r in self.reference.active() if r.label != row.label]
        before = radii(self.book)
        caps = {e.event_id: by for e, by in zip(self.book.entries, self.book.capped_by.tolist())}
        gone = add(self.book, row)
        self.reference.rows.append(row)
        self.past.append(list(self.reference.rows))
        assert set(gone) <= set(rivals)
        for r in self.reference.rows[:-1]:  # 7: no action at a distance
            touched = r.label != row.label and math.dist(r.key, row.key) < r.raw + row.raw
            freed = caps[r.id] >= 0 and self.book.entries[caps[r.id]].event_id in gone
            assert touched or freed or r.id in gone or radii(self.book)[r.id] == before[r.id]

    def _remove(self, ids: list[str]) -> None:
        self.book.remove(ids)
        self.reference.rows = [r for r in self.reference.rows if r.id not in ids]
        self.past.append(list(self.reference.rows))

    @rule(key=grid, raw=sizes, label=labels, positive=st.integers(0, 2))
    def insert(self, key: tuple, raw: int, label: tuple, positive: int) -> None:
        self.count += 1
        self._add(Row(f"e{self.count}", key, float(raw), label, float(positive)))

    @precondition(lambda self: self.reference.rows)
    @rule(data=st.data(), raw=sizes, label=labels)
    def revise(self, data: st.DataObject, raw: int, label: tuple) -> None:
        self.count += 1
        old = data.draw(st.sampled_from(self.reference.rows))
        self._add(Row(f"e{self.count}", old.key, float(raw), label, old.positive))
        assert self.book.entries[int(self.book.retrieve(torch.tensor([old.key]).float())[0][0])].label == label

    @precondition(lambda self: self.reference.active())
    @rule(data=st.data())
    def revert(self, data: st.DataObject) -> None:
        newest = data.draw(st.sampled_from(self.reference.active()))
        older = self.book.history(newest.id)
        self._remove([newest.id])
        assert set(older) <= {r.id for r in self.reference.rows}

    @precondition(lambda self: self.reference.rows)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        ids = data.draw(st.sets(st.sampled_from([r.id for r in self.reference.rows]), min_size=1, max_size=3))
        self._remove(sorted(ids))
        with pytest.raises(KeyError):
            self.book.remove(ids)

    @rule()
    def save_and_load(self) -> None:
        state = self.book.state()
        words = json.loads(json.dumps({k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}))
        self.book = Codebook(3, rule=self.reference.rule)
        self.book.load({**state, **words})
        self.handed.append((state, {k: v.clone() if isinstance(v, torch.Tensor) else json.dumps(v) for k, v in state.items()}))

    @rule(xs=queries)
    def query(self, xs: list) -> None:
        assert hits(self.book, xs) == [self.reference.retrieve(x) for x in xs]

    @rule(xs=queries, data=st.data())
    def as_of(self, xs: list, data: st.DataObject) -> None:
        t = data.draw(st.integers(0, len(self.past) - 1))
        then = ReferenceCodebook(self.reference.rule, self.reference.nulls, self.past[t])
        assert hits(self.book.as_of(t), xs) == [then.retrieve(x) for x in xs]

    @rule(xs=queries)
    def gate(self, xs: list) -> None:
        """40: hits and misses add up to the queries."""
        gate = Gate(None, [], self.book, lambda act, batch: act[:, 0])  # type: ignore[arg-type]
        rows = torch.ones(len(xs), 1, dtype=torch.bool)
        gate.decide(torch.tensor(xs, dtype=torch.float)[:, None], Batch({}, rows, ~rows, ~rows))
        assert gate.hit_counts.queries == len(xs)
        assert gate.hit_counts.misses == hits(self.book, xs).count(None)

    @invariant()
    def disjoint(self) -> None:
        """18."""
        reach = radii(self.book) if hasattr(self, "book") else {}
        for a, b in combinations([r for r in getattr(self, "reference", ReferenceCodebook()).rows if reach[r.id] >= 0], 2):
            assert a.label == b.label or reach[a.id] + reach[b.id] <= math.dist(a.key, b.key)

    @invariant()
    def log_only_grows(self) -> None:
        """35, 38: one line an operation."""
        assert len(getattr(self, "past", [[]])) - 1 == len(self.book.log if hasattr(self, "book") else [])

    @invariant()
    def what_was_handed_out_stays(self) -> None:
        """5: states given away are never written to."""
        for state, kept in getattr(self, "handed", []):
            for k, v in kept.items():
                assert torch.equal(state[k], v) if isinstance(v, torch.Tensor) else json.dumps(state[k]) == v


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=2 * EXAMPLES // 5, stateful_step_count=20, deadline=None)
