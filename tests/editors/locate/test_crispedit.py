"""CrispEdit against plain computations: factors, the projection, steps within the subspace, renewal, and its limits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streams.base import TrainPool
from testbed.core.events import EditBatch, EditEvent
from testbed.editors.base import BadEditor
from testbed.editors.baselines.locft import LocFT, LocFTConfig
from testbed.editors.locate.crispedit import CrispEdit, CrispEditConfig
from testbed.editors.locate.general_text import corpus_of
from testbed.editors.locate.kfac import Factors, Subspace, batches, factors, may_change, merged, text_factors
from testbed.editors.locate.targets import RowAdam
from testbed.experiment.config import RunConfig
from testbed.model.encoding import answer_ids
from testbed.model.predictor import ModelPredictor
from tests.helpers.facts import POOL, TEXTS
from tests.helpers.models import build

WORDS = ("red", "blue", "green", "gold", "white", "black")
FACTS = [EditEvent("add", 1.0 + i, i, f"The colour of {s} is", w, subject=s) for i, (s, w) in enumerate(zip("ABCDEF", WORDS))]


def make(kind: str = "llama", pool: TrainPool = POOL, **given: Any) -> CrispEdit:
    editor = CrispEdit(CrispEditConfig(**given))
    editor.prepare(build(kind), pool)
    return editor


def apply(editor: Any, events: list[EditEvent], step: int = 1) -> dict[str, float]:
    report = editor.apply(EditBatch(tuple(events), step))
    assert not report.failed, report.failed
    return report.notes


def random_factors(seed: int, d: int, f: int, n: int = 1) -> Factors:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(w, w, generator=g, dtype=torch.float64) for w in (f, d))
    return Factors(a @ a.T, b @ b.T, n)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 6), st.integers(2, 8), st.floats(0.05, 0.95))
def test_what_is_held_fixed_is_the_fewest_directions_with_the_share_of_the_curvature(seed: int, d: int, f: int, gamma: float) -> None:
    costs = torch.rand(d, f, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    held = ~may_change(costs, gamma)
    assert float(costs[held].sum()) >= gamma * float(costs.sum()) * (1 - 1e-12)
    assert float(costs[held].sum() - costs[held].min()) < gamma * float(costs.sum())
    assert not held.all() or bool((costs[held].sum() - costs[held].min()) < gamma * costs.sum())
    assert not (~held).any() or float(costs[~held].max()) <= float(costs[held].min())
    assert may_change(costs, 0.0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 0.9))
def test_the_projection_is_one_and_its_image_costs_what_is_left(seed: int, gamma: float) -> None:
    found = random_factors(seed, 5, 7)
    space, change = Subspace(found, gamma), torch.randn(5, 7, generator=torch.Generator().manual_seed(seed + 1))
    if not space.free.any():
        return
    once = space.project(change)
    torch.testing.assert_close(space.project(once), once, atol=1e-5, rtol=1e-4)
    assert abs(float((once * (change - once)).sum())) < 1e-4 * float(change.square().sum())

    def cost(m: Tensor) -> float:
        return float((m.double() * (found.b @ m.double() @ found.a)).sum())

    assert cost(once) <= cost(change) * (1 + 1e-4)
    assert cost(once) + cost(change - once) == pytest.approx(cost(change), rel=1e-3)


def test_factors_of_rank_one_by_hand() -> None:
    u, v = torch.tensor([3.0, 4.0]) / 5, torch.tensor([1.0, 2.0, 2.0]) / 3
    space = Subspace(Factors(torch.outer(v, v).double(), torch.outer(u, u).double(), 1), 0.99)
    change = torch.arange(6.0).reshape(2, 3)
    torch.testing.assert_close(space.project(change), change - torch.outer(u, u) @ change @ torch.outer(v, v), atol=1e-5, rtol=1e-5)
    assert int((~space.free).sum()) == 1


def test_merging_weighs_by_positions_and_nothing_free_is_refused() -> None:
    one, other = random_factors(0, 3, 4, 10), random_factors(1, 3, 4, 30)
    both = merged([one, other])
    torch.testing.assert_close(both.a, 0.25 * one.a + 0.75 * other.a)
    torch.testing.assert_close(both.b, 0.25 * one.b + 0.75 * other.b)
    assert both.n == 40
    with pytest.raises(BadEditor, match="holds all 12 directions"):
        Subspace(Factors(torch.eye(4).double(), torch.eye(3).double(), 1), 0.5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_factors_are_those_of_the_whole_models_gradients(kind: str) -> None:
    """One text at a time, by autograd on the weight's own output."""
    handle = build(kind)
    corpus = corpus_of(handle, TrainPool(texts=TEXTS[:3]), None)
    found = factors(handle, batches(handle, corpus), (1, 2))
    sums: dict[int, list[Tensor]] = {n: [torch.zeros(1), torch.zeros(1)] for n in (1, 2)}
    count = 0
    for ids in corpus.sequences(handle):
        kept: dict[int, tuple[Tensor, Tensor]] = {}

        def watch(n: int, args: Any, out: Tensor, kept: dict[int, tuple[Tensor, Tensor]] = kept) -> Tensor:
            kept[n] = (args[0].reshape(-1, args[0].shape[-1]), torch.zeros_like(out, requires_grad=True))
            return out + kept[n][1]

        tokens = torch.tensor([ids])
        with handle.hooked(handle.down(1), lambda m, a, o: watch(1, a, o)), handle.hooked(handle.down(2), lambda m, a, o: watch(2, a, o)):
            logits = handle.model(tokens).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:], reduction="sum")
        for n, g in zip((1, 2), torch.autograd.grad(loss, [kept[1][1], kept[2][1]])):
            a, g = kept[n][0][:-1].detach().double(), g.reshape(len(ids), -1)[:-1].double()
            sums[n] = [sums[n][0] + a.T @ a, sums[n][1] + g.T @ g]
        count += len(ids) - 1
    for n in (1, 2):
        assert found[n].n == count
        torch.testing.assert_close(found[n].a, sums[n][0] / count, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[n].b, sums[n][1] / count, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_a_projected_step_lies_in_the_subspace_and_the_released_one_does_not(gamma: float) -> None:
    for project, inside in (("step", True), ("gradient", False)):
        editor = make(layers=(1, 2), gamma=gamma, epochs=5, stop=0.0, project=project, past=False)
        apply(editor, FACTS[:3])
        for n, change in editor.changes.items():
            space, change = editor._subspaces()[n], change.double()
            u_a, u_b = space.u_a.double(), space.u_b.double()
            outside = ((u_b.T @ change @ u_a) * ~space.free).norm() / change.norm()
            assert (float(outside) < 1e-6) == inside, (project, n, float(outside))
            assert inside or float(outside) > 0.01


def test_gamma_zero_is_plain_adam() -> None:
    crisp, plain = make(layers=(2,), gamma=0.0, epochs=3, stop=0.0, lr=1e-3), LocFT(LocFTConfig(layer=2, epochs=3, stop=0.0, lr=1e-3))
    plain.prepare(build("llama"), TrainPool())
    for editor in (crisp, plain):
        apply(editor, FACTS[:3])
    torch.testing.assert_close(crisp.edited_weights()[plain.weight_name], plain.weight, atol=2e-5, rtol=1e-4)
    adam = RowAdam(torch.zeros(2, 2), 0.1)
    torch.testing.assert_close(adam.step(torch.tensor([[1.0, -2.0], [3.0, 0.5]])).abs(), torch.full((2, 2), 0.1))


def test_a_change_of_the_same_size_moves_the_text_less_than_adams() -> None:
    """By the mean square change of its tokens' log-probabilities, which is what the factors estimate to first order."""
    handle, moved = build("llama"), {}
    name = handle.down_weight(2)

    def logprobs(change: Tensor) -> Tensor:
        predictor = ModelPredictor(handle, weights={name: handle.parameter(name) + change})
        return torch.cat([torch.from_numpy(x) for x in predictor.text_logprobs(TEXTS)])

    for gamma in (0.0, 0.9):
        editor = make(layers=(2,), gamma=gamma, epochs=10, stop=0.0, past=False)
        apply(editor, FACTS[:3])
        change = editor.changes[2]
        moved[gamma] = float((logprobs(0.5 * change / change.norm()) - logprobs(torch.zeros(()))).square().mean())
    assert moved[0.9] < moved[0.0] / 3


def test_factors_of_the_text_are_renewed_by_the_rule_and_a_loaded_state_goes_on_alike() -> None:
    still, moving = make(renew=100.0), make(renew=1e-6)
    for editor in (still, moving):
        assert apply(editor, FACTS[:2])["renewed"] == 0
    before = still._subspaces()
    assert apply(still, FACTS[2:4], 2)["renewed"] == 0 and apply(moving, FACTS[2:4], 2)["renewed"] == 1
    assert still._subspaces() is not before  # past edits were merged in
    again = make(renew=1e-6)
    again.load_state_dict(moving.state_dict())
    assert not torch.equal(again.anchors[2], torch.zeros_like(again.anchors[2]))
    for editor in (again, moving):
        apply(editor, FACTS[4:], 3)
    assert torch.equal(again.changes[2], moving.changes[2])


def test_factors_of_past_edits_are_those_of_their_answers_tokens() -> None:
    editor = make()
    apply(editor, FACTS[:2])
    apply(editor, FACTS[2:3], 2)
    tokens = [len(answer_ids(editor.handle, e.ask(), e.target)) + 1 for e in FACTS[:3]]  # the end token too
    assert {f.n for f in editor.past.values()} == {sum(tokens)}
    quiet = make(past=False)
    apply(quiet, FACTS[:2])
    assert not quiet.past and quiet.state_bytes() < editor.state_bytes()


def test_identical_edits_are_one_edit_and_a_state_of_another_model_is_refused() -> None:
    again = [EditEvent("add", 1.0, i, FACTS[0].prompt, FACTS[0].target, subject="A", source=str(i)) for i in range(3)]
    one, three = make(epochs=4, stop=0.0, past=False), make(epochs=4, stop=0.0, past=False)
    apply(one, again[:1])
    apply(three, again)
    for n, change in one.changes.items():
        torch.testing.assert_close(three.changes[n], change, atol=1e-4, rtol=1e-2)
    with pytest.raises(BadEditor, match="made with model another"):
        make().load_state_dict({**one.state_dict(), "model": "another"})
    with pytest.raises(BadEditor, match="made with layers"):
        make(layers=(1, 2)).load_state_dict(one.state_dict())


def test_factors_are_kept_on_disk_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    from testbed.model.loading import load
    from tests.helpers.models import folder

    handle = load(str(folder("llama")), device="cpu")
    handle.cache_folder = tmp_path
    corpus, notes = corpus_of(handle, POOL, None), []
    first = text_factors(handle, corpus, (1, 2), 200, notes)
    assert "positions" in notes[0]
    handle.cache.clear()
    (path,) = (tmp_path / "kfac").iterdir()
    again = text_factors(handle, corpus, (1, 2), 200)
    assert all(torch.equal(first[n].a, again[n].a) and first[n].n == again[n].n for n in (1, 2))
    handle.cache.clear()
    path.write_bytes(b"nothing")
    with pytest.raises(BadEditor, match="remove the file"):
        text_factors(handle, corpus, (1, 2), 200)


def test_values_that_cannot_be_used_are_named() -> None:
    problems = "\n".join(RunConfig(editor=("crispedit[layers=3,1]", "crispedit[gamma=2]", "crispedit[renew=0]")).problems())
    for part in ("layers must be one or more layers, rising", "gamma must be", "renew must be positive"):
        assert part in problems
    with pytest.raises(BadEditor, match="no general text"):
        factors(build("llama"), iter(()), (1,))
    assert replace(CrispEditConfig(), gamma=0.5).problems() == []
