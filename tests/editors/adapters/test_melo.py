"""MELO: the laws of its clusters, which block a prompt gets, what an edit may change, and what undo takes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch, EditEvent, Question
from testbed.editors.adapters.melo import BlockRouter, Melo, MeloConfig, Point, VectorDatabase
from testbed.editors.base import BadEditor
from testbed.editors.codebook.nearest import to_all
from testbed.model.predictor import ModelPredictor
from tests.helpers.models import build

FACTS = [
    EditEvent("add", 1.0 + i, i, f"Who leads {s} now?", w, subject=s)
    for i, (s, w) in enumerate(zip(("the northern harbour", "Zor", "a small lamp", "Mara Venn"), ("red", "blue", "green", "two")))
]
POOL = TrainPool(tuple(Question("general", f"What is the {w} thing {i}?", w, topic="x") for i, w in enumerate(("old", "big", "far") * 4)))
OTHERS = [Ask("the small lamp stands beside the river"), Ask("USER: what colour is the ship? ASSISTANT:")]

Row = tuple[tuple[int, int], tuple[int, ...]]
ROWS = st.lists(st.tuples(st.tuples(st.integers(-6, 6), st.integers(-6, 6)), st.sampled_from([(12, 14), (13, 13), (7,)])), max_size=9)
"""Points on a grid, where ties and equal keys are frequent, with answers of which two have the same sum of token ids."""


def filled(rows: list[Row], start: float = 3.0) -> VectorDatabase:
    database = VectorDatabase(start, torch.zeros(0, 2))
    for i, (key, label) in enumerate(rows):
        database = database.with_point(Point(f"e{i}", label, f"b{i}"), torch.tensor(key, dtype=torch.float32) + 20)
    return database


def make(kind: str = "llama", pool: TrainPool = POOL, seed: int = 0, **given: Any) -> Melo:
    editor = Melo(MeloConfig(**{"steps": 6, **given}), seed=seed)
    editor.prepare(build(kind), pool)
    return editor


def apply(editor: Melo, events: list[EditEvent], step: int = 1) -> dict[str, float]:
    report = editor.apply(EditBatch(tuple(events), step))
    assert not report.failed, report.failed
    return report.notes


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_balls_of_different_answers_never_overlap(rows: list[Row]) -> None:
    d = filled(rows)
    for i in (d.radii >= 0).nonzero()[:, 0].tolist():
        away = to_all(d.centres, d.centres[i], "euclidean")
        for j in (d.radii >= 0).nonzero()[:, 0].tolist():
            assert d.labels[i] == d.labels[j] or away[j] >= d.radii[i] + d.radii[j] - 1e-9


@settings(max_examples=40, deadline=None)
@given(ROWS)
def test_the_newest_edit_answers_its_own_prompt_and_members_lie_in_their_ball(rows: list[Row]) -> None:
    d = filled(rows)
    if rows:
        assert BlockRouter(d).retrieve(d.keys[-1:])[0].tolist() == [len(rows) - 1]
    for i, at in enumerate(d.cluster.tolist()):
        if at >= 0:
            assert d.labels[at] == d.points[i].label
            assert to_all(d.centres[at : at + 1], d.keys[i], "euclidean")[0] <= d.radii[at]
    assert all((d.cluster == at).any() == (d.radii[at] >= 0) for at in range(len(d.labels)))
    assert d.forgotten == sum(at < 0 for at in d.cluster.tolist())


@settings(max_examples=40, deadline=None)
@given(ROWS, st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=1, max_size=5))
def test_a_prompt_gets_a_block_exactly_where_a_ball_holds_it_whatever_stands_beside_it(
    rows: list[Row], asked: list[tuple[int, int]]
) -> None:
    d, queries = filled(rows), torch.tensor(asked, dtype=torch.float32) + 20
    together, _ = BlockRouter(d).retrieve(queries)
    for query, row in zip(queries, together.tolist()):
        held = (to_all(d.centres, query, "euclidean") <= d.radii).nonzero()[:, 0].tolist() if len(d.centres) else []
        assert (row >= 0) == bool(held)
        assert row < 0 or int(d.cluster[row]) in held
        assert BlockRouter(d).retrieve(query[None])[0].tolist() == [row]


@settings(max_examples=40, deadline=None)
@given(ROWS, st.sets(st.integers(0, 8)))
def test_removal_leaves_the_database_that_never_saw_the_edits(rows: list[Row], gone: set[int]) -> None:
    d = filled(rows)
    gone = {i for i in gone if i < len(rows)}
    found = d.without([f"e{i}" for i in gone])
    plain = VectorDatabase(d.start, torch.zeros(0, 2))
    for i, point in enumerate(d.points):
        plain = plain if i in gone else plain.with_point(point, d.keys[i])
    assert found.points == plain.points and found.labels == plain.labels
    assert all(torch.equal(getattr(found, k), getattr(plain, k)) for k in ("cluster", "radii"))
    with pytest.raises(BadEditor, match="holds no edit nobody"):
        d.without(["nobody"])


def test_a_split_halves_the_distance_counts_what_it_forgets_and_answers_with_equal_id_sums_differ() -> None:
    d = filled([((0, 0), (12, 14)), ((2, 0), (13, 13))])
    assert len(d.labels) == 2  # released code takes 12 + 14 and 13 + 13 for one answer, and would join them
    assert d.radii.tolist() == pytest.approx([1 - 1e-5, 1 + 1e-5], abs=1e-7) and d.forgotten == 0
    joined = filled([((0, 0), (7,)), ((2, 0), (7,))])
    assert len(joined.labels) == 1 and joined.centres.tolist() == [[21.0, 20.0]] and float(joined.radii[0]) == 3.0
    shrunk = filled([((0, 0), (7,)), ((2, 0), (7,)), ((2, 1), (13, 13))])
    assert shrunk.forgotten == 2 and float(shrunk.radii[0]) == -1.0  # both members lie outside the halved ball


def test_a_new_value_of_a_fact_ends_the_cluster_of_the_old_one() -> None:
    d = filled([((0, 0), (7,)), ((0, 0), (13, 13))])
    assert d.radii.tolist() == [-1.0, 3.0] and d.forgotten == 1


def test_a_miss_keeps_the_base_bits_and_a_hit_does_not() -> None:
    editor = make(radius=1e-4)
    apply(editor, FACTS[:2])
    base, edited = ModelPredictor(editor.handle), editor.predictor()
    asks = [FACTS[0].ask(), *OTHERS]
    old, new = (p.inspect(asks, layers=(1, 2)) for p in (base, edited))
    assert [x["entry"] for x in (r.extras for r in edited.respond(asks, [None] * 3))] == [FACTS[0].id, None, None]
    for i in (1, 2):
        assert np.array_equal(old[i].logprobs, new[i].logprobs) and np.array_equal(old[i].hidden, new[i].hidden)
    assert not np.array_equal(old[0].hidden, new[0].hidden)


def test_an_edit_trains_its_own_block_and_leaves_all_others_as_they_were() -> None:
    editor = make(edits_per_block=2)
    apply(editor, FACTS[:3])
    assert list(editor.blocks) == [FACTS[0].id, FACTS[2].id]
    before = {k: [(a.u.clone(), a.v.clone()) for a in block] for k, block in editor.blocks.items()}
    apply(editor, FACTS[3:], 2)
    assert len(editor.blocks) == 3
    for k, block in before.items():
        assert all(torch.equal(a.u, u) and torch.equal(a.v, v) for a, (u, v) in zip(editor.blocks[k], block))


def test_undo_drops_points_and_a_block_only_when_no_edit_needs_it() -> None:
    editor = make(edits_per_block=2)
    apply(editor, FACTS[:2])
    block = editor.blocks[FACTS[0].id]
    editor.revert([FACTS[0].id])
    assert editor.blocks == {FACTS[0].id: block} and [p.event_id for p in editor.database.points] == [FACTS[1].id]
    editor.revert([FACTS[1].id])
    assert not editor.blocks and not len(editor.database)


def test_the_radius_is_a_share_of_the_distances_of_this_model_and_a_note_says_so() -> None:
    editor = make()
    assert any("from 12 questions of the train pool" in n for n in editor.notes)
    wider = make(quantile=0.5).database.start
    assert 0 < editor.database.start < wider
    assert make(radius=75.0).database.start == 75.0
    empty = make(pool=TrainPool())
    assert empty.database.start == 0.5 and any("no train pool" in n for n in empty.notes)


def test_the_database_may_read_an_earlier_map_and_refuses_a_later_one() -> None:
    editor = make("gpt2", modules=r"\.2\.mlp\.c_fc$", database=r"\.1\.mlp\.c_fc$", radius=1.0)
    apply(editor, FACTS[:1])
    assert editor.read.layer == 1 and editor.database.keys.shape == (1, editor.read.f)
    (found,) = editor.predictor().respond([FACTS[0].ask()], [None])
    assert found.extras["entry"] == FACTS[0].id
    with pytest.raises(BadEditor, match="name an earlier map"):
        make("gpt2", modules=r"\.1\.mlp\.c_fc$", database=r"\.2\.mlp\.c_fc$")


def test_one_seed_trains_one_block_whatever_stands_in_the_batch_before() -> None:
    one, two = make(edits_per_block=1), make(edits_per_block=1)
    apply(one, FACTS[:2])
    apply(two, FACTS[1:2])
    for a, b in zip(one.blocks[FACTS[1].id], two.blocks[FACTS[1].id]):
        assert torch.equal(a.u, b.u) and torch.equal(a.v, b.v)
