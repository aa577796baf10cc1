"""MEMOIR: masks as sets of bits, what an edit may change, when the memory acts, and what its state holds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch, EditEvent, Question
from testbed.editors.base import BadEditor
from testbed.editors.codebook.memoir import Memoir, MemoirConfig, OverlapRouter, common, packed, unpacked
from testbed.experiment.config import RunConfig
from testbed.model.encoding import collate
from testbed.model.predictor import ModelPredictor
from tests.helpers.models import build

SUBJECTS = ("the northern harbour", "Zor", "a small lamp", "Mara Venn")
FACTS = [
    EditEvent("add", 1.0 + i, i, f"Who leads {s} now?", w, subject=s)
    for i, (s, w) in enumerate(zip(SUBJECTS, ("red", "blue", "green", "two")))
]
POOL = TrainPool(tuple(Question("general", f"What is the {w} thing {i}?", w, topic="x") for i, w in enumerate(("old", "big", "far") * 4)))
OTHERS = [Ask("the small lamp stands beside the river"), Ask("USER: what colour is the ship? ASSISTANT:")]


def make(kind: str = "llama", pool: TrainPool = POOL, seed: int = 0, **given: Any) -> Memoir:
    editor = Memoir(MemoirConfig(**{"layer": 1, **given}), seed=seed)
    editor.prepare(build(kind), pool)
    return editor


def apply(editor: Memoir, events: list[EditEvent], step: int = 1) -> dict[str, float]:
    report = editor.apply(EditBatch(tuple(events), step))
    assert not report.failed, report.failed
    return report.notes


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 200), st.integers(1, 8))
def test_bits_hold_the_sets_and_their_overlap_is_the_size_of_the_intersection(seed: int, f: int, n: int) -> None:
    g = torch.Generator().manual_seed(seed)
    k = 1 + int(torch.randint(f, (1,), generator=g))
    columns = torch.stack([torch.randperm(f, generator=g)[:k].sort().values for _ in range(n)])
    masks = packed(columns, f)
    assert masks.shape == (n, -(-f // 64)) and masks.dtype == torch.long
    assert [row.nonzero()[:, 0].tolist() for row in unpacked(masks, f)] == columns.tolist()
    sets = [set(row) for row in columns.tolist()]
    assert common(masks[0], masks).tolist() == [len(sets[0] & s) for s in sets]


def test_the_edit_of_most_overlap_answers_and_of_equal_ones_the_newest() -> None:
    columns = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]])
    router = OverlapRouter(["a", "b", "c"], packed(columns, 70), 4, 0.75)
    row, share = router.retrieve(packed(torch.tensor([[0, 1, 2, 3], [4, 5, 6, 60], [4, 5, 60, 61]]), 70))
    assert row.tolist() == [2, 1, -1] and share.tolist() == [1.0, 0.75, 0.5]
    assert router.entry_of(1) == "b" and len(router) == 3


def test_the_mask_is_the_largest_centred_means_permuted() -> None:
    editor, handle = make(), build("llama")

    def mean(ask: Ask) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        with handle.hooked(handle.down(1), lambda m, args: kept.append(args[0]), pre=True):
            handle.model(**collate(handle, [ask]).inputs)
        return kept[0][0].mean(0)

    centre = torch.stack([mean(q.ask()) for q in POOL.questions]).mean(0)
    torch.testing.assert_close(editor.centre, centre, atol=1e-5, rtol=1e-4)
    apply(editor, FACTS[:1])
    largest = np.argsort(-(mean(FACTS[0].ask()) - centre).numpy(), kind="stable")[: editor.k]
    assert set(editor.order[torch.from_numpy(largest)].tolist()) == set(unpacked(editor.masks, editor.f)[0].nonzero()[:, 0].tolist())
    plain = make(permute=False)
    assert plain.order.tolist() == list(range(plain.f))
    assert sorted(editor.order.tolist()) == plain.order.tolist() != editor.order.tolist()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_edit_is_learned_in_its_columns_alone(kind: str) -> None:
    editor = make(kind, k=20)
    apply(editor, FACTS[:1])
    own = unpacked(editor.masks, editor.f)[0]
    assert int(own.sum()) == 20 and editor.memory[:, own].any() and not editor.memory[:, ~own].any()
    before, first = editor.memory, own
    apply(editor, FACTS[1:2], 2)
    second = unpacked(editor.masks, editor.f)[1]
    assert torch.equal(editor.memory[:, ~second], before[:, ~second])
    assert bool((first & ~second).any())
    scores = editor.predictor().score([FACTS[1].ask()], [FACTS[1].target])
    assert float(scores[0].logprobs.mean()) > -0.2


def test_edits_of_disjoint_masks_leave_each_other_as_they_are_to_the_bit() -> None:
    editor = make(k=8)
    columns = torch.tensor([list(range(8)), list(range(8, 16))])
    editor._columns = lambda means: columns[: len(means)]  # type: ignore[method-assign]
    apply(editor, FACTS[:1])
    before = editor.memory
    editor._columns = lambda means: columns[1:][: len(means)]  # type: ignore[method-assign]
    apply(editor, FACTS[1:2], 2)
    assert torch.equal(editor.memory[:, :8], before[:, :8]) and editor.memory[:, 8:16].any()


def test_the_edits_own_prompt_overlaps_wholly_and_a_miss_is_the_base_to_the_bit() -> None:
    editor, base = make(tau=0.999), ModelPredictor(build("llama"))
    apply(editor, FACTS)
    predictor = editor.predictor()
    asked = predictor.respond([e.ask() for e in FACTS], [e.target for e in FACTS], 4)
    assert [r.extras["entry"] for r in asked] == [e.id for e in FACTS]
    assert all(r.extras["distance"] == 1.0 for r in asked)
    mixed = [FACTS[0].ask(), *OTHERS]
    got, plain = (p.score(mixed, ["red"] * 3) for p in (predictor, with_a_gate(editor)))
    assert not np.array_equal(got[0].logprobs, plain[0].logprobs)
    assert all(np.array_equal(a.logprobs, b.logprobs) for a, b in zip(got[1:], plain[1:]))
    assert all(np.allclose(a.logprobs, b.logprobs, atol=1e-4) for a, b in zip(got[1:], base.score(OTHERS, ["red"] * 2)))


def with_a_gate(editor: Memoir) -> Any:
    """The base model, asked in the same padded rows as the editor."""
    empty = make()
    empty.load_state_dict({**editor.state_dict(), "memory": torch.zeros_like(editor.memory)})
    empty.hyper = editor.hyper
    return empty.predictor()


def test_the_permutation_comes_from_the_seed_and_lies_in_the_state() -> None:
    one, same, other = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(one.order, same.order) and not torch.equal(one.order, other.order)
    apply(one, FACTS[:2])
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.order, one.order)
    assert other.masks.shape[1] * 8 <= other.f / 8 + 8  # bytes of a mask: a bit a column
    what = [e.ask() for e in FACTS]
    for a, b in zip(one.predictor().score(what, ["red"] * 4), other.predictor().score(what, ["red"] * 4)):
        assert np.array_equal(a.logprobs, b.logprobs)
    handed = one.predictor()
    before = [s.logprobs for s in handed.score(what, ["red"] * 4)]
    apply(one, FACTS[2:], 2)
    assert all(np.array_equal(a, s.logprobs) for a, s in zip(before, handed.score(what, ["red"] * 4)))


def test_identical_edits_a_learned_edit_and_foreign_states_have_their_rules() -> None:
    editor = make(stop=0.5)
    again = [EditEvent("add", 1.0, i, FACTS[0].prompt, FACTS[0].target, subject="x", source=str(i)) for i in range(3)]
    assert apply(editor, again)["entries"] == 3
    assert len({tuple(m) for m in editor.masks.tolist()}) == 1
    before = editor.memory
    assert apply(editor, again[:1], 2)["steps"] == 0  # nothing is left to learn, and nothing is written
    assert torch.equal(editor.memory, before)
    with pytest.raises(BadEditor, match="made with model another"):
        make().load_state_dict({**editor.state_dict(), "model": "another"})
    with pytest.raises(BadEditor, match="made with k"):
        make(k=5).load_state_dict(editor.state_dict())
    assert any("without a centre" in n for n in make(pool=TrainPool()).notes)
    problems = "\n".join(RunConfig(editor=("memoir[tau=0]", "memoir[k=0]", "memoir[clip=-1]")).problems())
    assert all(part in problems for part in ("tau must be", "k must be", "clip must be"))
