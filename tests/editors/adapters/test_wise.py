"""WISE: the routing signal, its margins, shards, TIES, and a gate that sees the prompt alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.base import TrainPool
from testbed.core.events import Ask, EditBatch, EditEvent, Question
from testbed.editors.adapters.wise import DEFAULTS, PUBLISHED, MemoryRouter, SideMemory, Wise, WiseConfig, ties, trimmed
from testbed.editors.base import BadEditor
from testbed.editors.codebook.gate import Gate
from testbed.editors.hyperparameters import LLAMA_2_7B, LLAMA_3_8B, filled
from testbed.model.encoding import collate
from tests.helpers.facts import FACTS, POOL, fact
from tests.helpers.models import Noise, build

SMALL: dict[str, Any] = {"layer": 1, "lr": 0.5, "steps": 8, "clamp": 0.5, "density": 0.5}
PICTURED = [fact("the northern harbour", "Mara Venn", 1), fact("Zor", "two red towers"), fact("the old bridge", "green", 2)]


def make(kind: str = "llava", pool: TrainPool = POOL, **config: Any) -> Wise:
    editor = Wise(WiseConfig(**{**SMALL, **config}))
    editor.prepare(build(kind), pool)
    return editor


def edited(events: list[EditEvent] = PICTURED, kind: str = "llava", **config: Any) -> Wise:
    editor = make(kind, **config)
    for step, e in enumerate(events, 1):
        assert not editor.apply(EditBatch((e,), step)).failed
    return editor


def asks(events: list[EditEvent]) -> list[Ask]:
    return [e.ask() for e in events]


def signals(editor: Wise, what: list[Ask], side: Any = "left", answers: list[list[int]] | None = None) -> torch.Tensor:
    """(B, S) as the gate reads them in a batch."""
    batch = collate(editor.handle, what, answers, side=side)
    kept: list[torch.Tensor] = []
    with torch.no_grad(), editor.handle.hooked(editor.module, lambda m, args: kept.append(args[0]), pre=True):
        editor.handle.model(**batch.inputs, use_cache=False)
    return editor._signals(kept[0], batch, editor._live())


# The signal


@pytest.mark.parametrize("kind", ["llava", "gpt2"])
def test_the_signal_is_the_mean_difference_of_the_two_outputs_over_the_prompt(kind: str) -> None:
    events = PICTURED if kind == "llava" else FACTS
    editor = edited(events, kind)
    got = signals(editor, asks(events))[:, -1]
    for i, a in enumerate(asks(events)):
        batch = collate(editor.handle, [a])
        kept: list[torch.Tensor] = []
        with torch.no_grad(), editor.handle.hooked(editor.module, lambda m, args, kept=kept: kept.append(args[0]), pre=True):
            editor.handle.model(**batch.inputs, use_cache=False)
        act, change = kept[0][0].double(), editor.working.change.double()
        through = act @ (change if kind == "gpt2" else change.T)
        torch.testing.assert_close(float(got[i]), float(through.norm(dim=-1).mean()), atol=1e-4, rtol=1e-4)


def test_it_sees_neither_padding_nor_batch_mates_nor_the_answer() -> None:
    editor = edited()
    what = [*asks(PICTURED), Ask("what colour is the lamp in the northern harbour?"), Ask("who?", Noise(7))]
    want = torch.cat([signals(editor, [a]) for a in what])
    back = list(range(len(what)))[::-1]
    answers = [[40 + i, 50, 60][: 1 + i % 3] for i in range(len(what))]
    for got in (
        signals(editor, what),
        signals(editor, what, "right"),
        signals(editor, [what[i] for i in back])[back],
        signals(editor, what, "right", answers),
    ):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_its_gradient_is_finite_where_the_memories_still_agree() -> None:
    editor = make()
    change = torch.zeros_like(editor.weight, requires_grad=True)
    prompts = editor._read(asks(PICTURED))
    editor._signal(prompts, change).sum().backward()
    assert change.grad is not None
    assert torch.equal(change.grad, torch.zeros_like(change))


def test_margins_are_the_three_hinges() -> None:
    editor = make(alpha=0.3, beta=2.0, gamma=1.0)
    edits, others = editor._read(asks(PICTURED[:2])), editor._read([Ask("a lamp"), Ask("the river and the old bridge")])
    change = 0.05 * torch.randn(editor.weight.shape, generator=torch.Generator().manual_seed(0))
    near, far = editor._signal(edits, change).tolist(), editor._signal(others, change).tolist()
    u = editor.unit
    want = sum(max(0, 2 * u - n) + max(0, f - 0.3 * u) + max(0, u - (n - f)) for n, f in zip(near, far)) / 2
    assert float(editor._margins(edits, others, change)) == pytest.approx(want, rel=1e-4)
    without = sum(max(0, 2 * u - n) for n in near) / 2
    assert float(editor._margins(edits, None, change)) == pytest.approx(without, rel=1e-4)


# Routing


def test_a_prompt_goes_to_the_largest_signal_over_its_threshold() -> None:
    router = MemoryRouter([1.0, 5.0])
    row, largest = router.retrieve(torch.tensor([[0.5, 4.0], [1.0, 4.9], [2.0, 6.0], [9.0, 6.0]]))
    assert row.tolist() == [-1, 0, 1, 0]
    assert largest.tolist() == pytest.approx([4.0, 4.9, 6.0, 9.0])


def test_the_threshold_is_the_smallest_signal_seen_in_editing() -> None:
    editor = make(density=1.0)
    seen = []
    for step, e in enumerate(PICTURED, 1):
        report = editor.apply(EditBatch((e,), step))
        seen.append(float(signals(editor, asks([e]))[0, -1]))
        assert report.notes["threshold"] == pytest.approx(0.88 * min(seen), rel=1e-3)


def test_a_miss_is_the_base_itself_and_generation_agrees_with_and_without_cache() -> None:
    editor = edited(density=1.0)
    what = [*asks(PICTURED), Ask("who?", Noise(7))]
    batch = collate(editor.handle, what, side="left")
    live = editor._live()
    middle = float(signals(editor, what)[:, 0].median())

    def gate() -> Gate:
        answers = [(editor.module, editor._answer(live))]
        return Gate(editor.handle, answers, MemoryRouter([middle]), lambda act, b: editor._signals(act, b, live))

    with torch.no_grad():
        base = editor.handle.model(**batch.inputs, use_cache=False).logits
        with (g := gate()).around(batch):
            mixed = editor.handle.model(**batch.inputs, use_cache=False).logits
        hit = (g.row >= 0).tolist()
        assert {True, False} == set(hit)
        assert [not torch.equal(m, b) for m, b in zip(mixed, base)] == hit
        out = []
        for cache in (True, False):
            with gate().around(batch):
                out.append(editor.handle.model.generate(**batch.inputs, max_new_tokens=5, do_sample=False, use_cache=cache))
        assert torch.equal(out[0], out[1])


def test_an_edit_is_learned_and_routed() -> None:
    editor = edited(PICTURED[:1], density=1.0, steps=200, lr=0.2, stop=0.01)
    response = editor.predictor().respond(asks(PICTURED[:1]), [PICTURED[0].target], 4)[0]
    assert response.extras["entry"] == "memory 0"
    assert response.generated == PICTURED[0].target


# Shards and merging


def test_a_shard_changes_its_random_part_alone_and_within_the_clamp() -> None:
    editor = edited(clamp=0.01, lr=5.0)
    assert torch.equal(editor.working.change != 0, editor.mask & (editor.working.change != 0))
    assert 0.4 < float(editor.mask.float().mean()) < 0.6
    assert float(editor.working.change.abs().max()) == pytest.approx(0.01)


def test_shards_close_merge_and_begin_afresh() -> None:
    editor = make(shard=2, merge=4, density=0.3)
    masks = []
    for step in range(1, 6):
        editor.apply(EditBatch((fact(f"tower {step}", "green"),), step))
        masks.append(editor.mask)
        assert len(editor.memories) == (0, 1, 1, 1, 1)[step - 1]
    assert torch.equal(masks[0], torch.rand(editor.weight.shape, generator=editor.generator(0)) < 0.3)
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(masks[1], masks[2])
    assert len(editor._live()) == 2


@pytest.mark.parametrize(("retrieve", "kept"), [(True, 2), (False, 1)])
def test_retrieve_keeps_memories_side_by_side_and_merge_keeps_one(retrieve: bool, kept: int) -> None:
    editor = make(shard=1, merge=2, retrieve=retrieve)
    for step in range(1, 5):
        editor.apply(EditBatch((fact(f"tower {step}", "green"),), step))
    assert len(editor.memories) == kept
    assert min(m.least for m in editor.memories) < float("inf")


def plain_ties(changes: list[list[float]], weights: list[float], keep: int) -> list[float]:
    kept = []
    for c in changes:
        order = sorted(range(len(c)), key=lambda i: -abs(c[i]))[:keep]
        kept.append([x if i in order else 0.0 for i, x in enumerate(c)])
    out = []
    for column in zip(*kept):
        total = sum(w * x for w, x in zip(weights, column))
        same = [(w, x) for w, x in zip(weights, column) if x * total > 0]
        out.append(sum(w * x for w, x in same) / sum(w for w, _ in same) if same else 0.0)
    return out


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 4), size=st.integers(1, 8), share=st.floats(0.1, 1.0), seed=st.integers(0, 9999))
def test_ties_equals_its_definition(n: int, size: int, share: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    changes = torch.randn(n, size, generator=g, dtype=torch.float64)
    weights = (torch.rand(n, generator=g, dtype=torch.float64) + 0.1).tolist()
    want = plain_ties(changes.tolist(), weights, max(1, round(share * size)))
    torch.testing.assert_close(ties(list(changes), weights, share), torch.tensor(want, dtype=torch.float64))


def test_merging_identical_shards_whole_is_the_identity() -> None:
    change = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ties([change, change, change], [1.0, 0.5, 2.0], 1.0), change)
    assert torch.equal(trimmed(change, 1.0), change)
    assert int((trimmed(change, 0.2) != 0).sum()) == 7


# State and bad input


def test_a_stored_state_goes_on_with_the_same_shard() -> None:
    a, b = make(shard=2, merge=4), make(shard=2, merge=4)
    for step in (1, 2, 3):
        a.apply(EditBatch((fact(f"tower {step}", "green"),), step))
    b.load_state_dict(a.state_dict())
    for editor in (a, b):
        editor.apply(EditBatch((PICTURED[0],), 4))
    first, second = a.state_dict(), b.state_dict()
    assert all(torch.equal(v, second[k]) if isinstance(v, torch.Tensor) else v == second[k] for k, v in first.items())


def test_without_a_train_pool_it_says_so_and_pictures_are_left_out_for_a_text_model() -> None:
    editor = make(pool=TrainPool())
    assert any("train pool" in note for note in editor.notes)
    assert not editor.apply(EditBatch((PICTURED[0],), 1)).failed
    pictured = Question("general", "who?", "red", image=Noise(1), topic="x")
    assert [a.prompt for a in make("gpt2", TrainPool((pictured, POOL.questions[0]))).irrelevant] == [POOL.questions[0].prompt]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"shard": 0}, "shard must be 1 or more"),
        ({"shard": 3, "merge": 10}, "multiple of shard"),
        ({"ratio": 0.0}, "ratio must be positive and at most 1"),
        ({"density": 1.5}, "density must be positive and at most 1"),
        ({"keep": 0.0}, "keep must be positive and at most 1"),
        ({"lr": -1.0}, "lr must be positive"),
        ({"beta": 0.0}, "beta must be positive"),
    ],
)
def test_bad_values_are_told(config: dict[str, Any], words: str) -> None:
    assert any(words in p for p in WiseConfig(**config).problems())
    assert WiseConfig().problems() == []


def test_a_loss_that_is_not_finite_fails_and_a_state_of_another_layer_is_refused() -> None:
    editor = edited()
    before = editor.working
    with torch.no_grad():
        editor.working = SideMemory(torch.full_like(before.change, float("nan")), before.least)
    report = editor.apply(EditBatch((fact("the lamp", "green"),), 9))
    assert "not finite" in next(iter(report.failed.values())) or "nan" in next(iter(report.failed.values()))
    editor.working = before
    with pytest.raises(BadEditor, match="made with weight"):
        make(layer=2).load_state_dict(editor.state_dict())


def test_published_values_stand_in_the_table_and_derived_ones_are_announced() -> None:
    row = filled(WiseConfig(), {**DEFAULTS, **PUBLISHED[LLAMA_2_7B].values})
    assert (row.layer, row.lr, row.steps, row.clamp, row.alpha, row.beta, row.gamma, row.relative) == (27, 1, 70, 1, 5, 20, 10, False)
    other = filled(WiseConfig(), {**DEFAULTS, **PUBLISHED[LLAMA_3_8B].values})
    assert (other.layer, other.lr, other.steps, other.alpha, other.beta, other.gamma, other.ratio) == (29, 0.9, 30, 2, 20, 10, 0.5)
    editor = make()
    assert editor.hyper.relative
    assert any("no published values" in note for note in editor.notes)
