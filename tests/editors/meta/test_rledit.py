"""RLEdit: MALMEN's network and normal equations against plain ones, the loss of a trajectory, and how edits are made and undone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.base import TrainPool
from testbed.checks.editors import batch, equal_states, frozen
from testbed.core.events import EditEvent
from testbed.editors.adapters.lowrank import find_target_modules
from testbed.editors.base import BadEditor
from testbed.editors.hyperparameters import filled
from testbed.editors.meta.examples import apart, drawn_apart, examples_of, generator_of
from testbed.editors.meta.gradients import answer_rows, dense_adds, factors_of, hooked_forward
from testbed.editors.meta.malmen_network import MalmenNetwork, ridge_change
from testbed.editors.meta.mend_training import divergence
from testbed.editors.meta.rledit import RLEdit, RLEditConfig, derived
from testbed.editors.meta.rledit_training import RLEditTask, TrajectoryStep
from testbed.model.handle import as_stored
from tests.helpers.facts import FACTS, META_POOL
from tests.helpers.models import build
from tests.reference import malmen as plain

BRIEF: dict[str, Any] = {"train_steps": 2, "judge_every": 2, "train_batch": 2, "trajectory": 3}
KINDS = ["llama", "gpt2"]
ASKS, ANSWERS = [e.ask() for e in FACTS], [e.target for e in FACTS]


@cache
def targets(kind: str) -> Any:
    handle = build(kind)
    return find_target_modules(handle, str(derived(handle)["modules"]))


def editor(kind: str = "llama", pool: TrainPool = META_POOL, **config: Any) -> RLEdit:
    made = RLEdit(RLEditConfig(**{**BRIEF, **config}))
    made.prepare(build(kind), pool)
    return made


def hyper(**config: Any) -> Any:
    return filled(RLEditConfig(**{**BRIEF, "rank": 4, "blocks": 2, **config}), RLEdit.defaults)


def random_network(kind: str = "llama", **config: Any) -> MalmenNetwork:
    """A network with every tensor drawn, so that no part of an equation is the identity."""
    found, generator = MalmenNetwork.fresh(build(kind), targets(kind), hyper(**config)), torch.Generator().manual_seed(5)
    for of in (found.tensors, found.statistics):
        for name, t in of.items():
            drawn = 0.2 * torch.randn(t.shape, generator=generator)
            drawn = 1e-3 * drawn.abs() if name.startswith("alpha") else drawn
            of[name] = (drawn.abs() + 0.5 if name.startswith(("dev", "s", "n")) else drawn).requires_grad_(t.requires_grad)  # type: ignore[index]
    return found


def task(network: MalmenNetwork, kind: str = "llama", **config: Any) -> RLEditTask:
    handle = build(kind)
    return RLEditTask(handle, targets(kind), network, examples_of(handle, META_POOL.edits, 0.1), hyper(**config))


def batch_of(events: list[EditEvent], step: int = 1) -> Any:
    class Nothing:
        def paraphrases(self, event: EditEvent) -> tuple[str, ...]:
            return ()

    return batch(Nothing(), events, step)  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 12), st.integers(1, 8), st.integers(1, 5), st.floats(1e-2, 10.0))
def test_the_normal_equations_are_a_plain_ridge_regression(seed: int, n: int, f: int, d: int, amount: float) -> None:
    """In float64, whichever of the two systems is the smaller."""
    rng = np.random.default_rng(seed)
    keys, values = rng.normal(size=(n, f)), rng.normal(size=(n, d))
    found = ridge_change(torch.from_numpy(keys), torch.from_numpy(values), torch.tensor(amount, dtype=torch.float64))
    np.testing.assert_allclose(found.numpy(), plain.ridge(keys, values, amount), rtol=1e-7, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 5))
def test_the_network_is_the_plain_one(seed: int, positions: int) -> None:
    network, generator = random_network(), torch.Generator().manual_seed(seed)
    t = targets("llama")[0]
    u, delta = (torch.randn(positions, n, generator=generator) for n in (t.f, t.d))
    (found, *_) = network.changes_of([u], [delta])
    net = {n: x.detach().double().numpy() for n, x in {**network.tensors, **network.statistics}.items()}
    wanted = plain.change(net, 0, network.shapes[0], u.double().numpy(), delta.double().numpy(), 2)
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=2e-3, atol=1e-6)


def test_rows_in_another_order_make_the_same_change() -> None:
    network = random_network()
    keys, deltas, _ = answer_rows(build("llama"), targets("llama"), ASKS, ANSWERS)
    order = torch.randperm(len(keys[0]), generator=torch.Generator().manual_seed(1))
    for a, b in zip(network.changes_of(keys, deltas), network.changes_of([k[order] for k in keys], [d[order] for d in deltas])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_stand_where_answer_tokens_are_predicted_and_padding_counts_nothing(kind: str) -> None:
    handle = build(kind)
    keys, deltas, row = answer_rows(handle, targets(kind), ASKS, ANSWERS)
    alone_keys, alone_deltas, alone_row = answer_rows(handle, targets(kind), ASKS[1:2], ANSWERS[1:2])
    mine = torch.tensor([i for i, r in enumerate(row) if r == 1])
    assert len(mine) == len(alone_row)
    for together, alone in zip((*keys, *deltas), (*alone_keys, *alone_deltas)):
        torch.testing.assert_close(together[mine], alone, rtol=1e-4, atol=1e-6)
    read = hooked_forward(handle, targets(kind), ASKS, ANSWERS).batch.before_answer
    for k, d, of in zip(keys, deltas, factors_of(handle, targets(kind), ASKS, ANSWERS)):
        assert torch.equal(k[of.kept[read]], of.u[read][of.kept[read]])
        assert torch.equal(d[of.kept[read]], of.delta[read][of.kept[read]])


@pytest.mark.parametrize("kind", KINDS)
def test_the_untrained_network_steps_down_the_loss(kind: str) -> None:
    made = editor(kind, train_steps=1, judge_every=1, lr=1e-9, lr_alpha=1e-9)
    handle, one = build(kind), FACTS[0]
    before = hooked_forward(handle, made.targets, [one.ask()], [one.target]).losses([])
    assert not made.apply(batch_of([one])).failed
    with handle.swapped(made.edited_weights()):
        after = hooked_forward(handle, made.targets, [one.ask()], [one.target]).losses([])
    assert float(after) < float(before) - 0.1


def test_a_trajectory_makes_its_batches_on_the_weights_that_those_before_left() -> None:
    found = task(random_network(), train_batch=2)
    examples = drawn_apart(found.examples.train, 6, generator_of(0, 1))
    steps = list(found.steps(examples))
    assert [len(s.window) for s in steps] == [1, 2, 3]
    assert all(e is w for s, at in zip(steps, (0, 2, 4)) for e, w in zip(examples[at : at + 2], s.window[0]))
    handle = build("llama")
    assert all(torch.equal(w, handle.parameter(n)) for n, w in steps[0].weights.items())
    for one, two in itertools.pairwise(steps):
        for t, change in zip(found.targets, one.changes):
            moved = two.weights[t.weight] - one.weights[t.weight]
            torch.testing.assert_close(moved, as_stored(t.module, change.detach().float()), rtol=1e-3, atol=1e-6)
        with handle.swapped(two.weights):
            keys, _, _ = answer_rows(handle, found.targets, [e.edit for e in two.window[0]], [e.answer for e in two.window[0]])
        assert all(torch.equal(a, b) for a, b in zip(keys, two.keys))


def step_losses(found: RLEditTask, step: TrajectoryStep) -> list[float]:
    """Of each batch of the window by itself, with its mean over edits, without discount and without the size of the change."""
    alone = []
    adds = dense_adds(step.changes)
    for part in step.window:
        with found.handle.swapped(step.weights), torch.no_grad():
            edits = hooked_forward(found.handle, found.targets, [e.rephrasing for e in part], [e.answer for e in part]).losses(adds)
            kept = divergence(hooked_forward(found.handle, found.targets, [e.locality for e in part], [e.kept for e in part]), adds)
        alone.append(float(edits.mean() + found.h.c_loc * kept.mean()))
    return alone


@pytest.mark.parametrize(("discount", "depth"), [(0.95, 10), (0.5, 2), (0.0, 3), (0.9, 1)])
def test_older_batches_count_by_the_discount_down_to_the_depth(discount: float, depth: int) -> None:
    found = task(random_network(), discount=discount, depth=depth, weight_decay=0.0, train_batch=2)
    steps = list(found.steps(drawn_apart(found.examples.train, 8, generator_of(0, 1))))
    weights = plain.trajectory_weights(len(steps), depth, discount)
    for t, step in enumerate(steps):
        assert len(step.window) == min(depth, t + 1)
        wanted = sum(weights[t, t - back] * x for back, x in enumerate(step_losses(found, step)))
        assert float(found.step_loss(step).detach()) == pytest.approx(wanted, rel=1e-4)


def test_without_looking_back_a_trajectory_of_one_batch_is_malmens_loss() -> None:
    """One batch at the unedited weights: its rephrasings, the divergence beside, and nothing else."""
    found = task(random_network(), trajectory=1, weight_decay=0.0, train_batch=3)
    examples = drawn_apart(found.examples.train, 3, generator_of(0, 4))
    (step,) = found.steps(examples)
    (wanted,) = step_losses(found, step)
    assert float(found.loss(generator_of(0, 4)).detach()) == pytest.approx(wanted, rel=1e-5)


def test_the_size_of_a_change_is_weighed() -> None:
    bare, heavy = (task(random_network(), weight_decay=x) for x in (0.0, 2.0))
    (step,) = bare.steps(drawn_apart(bare.examples.train, 2, generator_of(0, 1)))
    size = sum(float(c.detach().square().sum()) for c in step.changes)
    assert float((heavy.step_loss(step) - bare.step_loss(step)).detach()) == pytest.approx(2 * size, rel=1e-3)


@pytest.mark.parametrize("name", ["alpha.2", "lambda.1", "U.64x96.1", "s.0.0"])
def test_the_gradient_of_a_trajectory_is_that_of_finite_differences(name: str) -> None:
    """Each step's loss by its own change, with the weights and gradients that the trajectory came to."""
    network = random_network()
    found = task(network, trajectory=3, train_batch=2)
    leaf = network.tensors[name]
    (gradient,) = torch.autograd.grad(found.loss(generator_of(0, 1)), [leaf])
    direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(2)) if leaf.ndim else torch.ones(())
    steps = list(found.steps(drawn_apart(found.examples.train, 6, generator_of(0, 1))))
    values, size = [], 1e-2 * (float(leaf.detach()) if name.startswith("alpha") else 1.0)
    for sign in (1, -1):
        with torch.no_grad():
            leaf += sign * size * direction
            values.append(sum(float(found.step_loss(replace(s, changes=network.changes_of(s.keys, s.deltas)))) for s in steps))
            leaf -= sign * size * direction
    wanted = (values[0] - values[1]) / (2 * size)
    assert float((gradient * direction).sum()) == pytest.approx(wanted, rel=0.03, abs=2e-3)


def test_a_mini_batch_asks_no_question_twice() -> None:
    twice = [*META_POOL.edits, *(replace(e, event=replace(e.event, target="blue", id="")) for e in META_POOL.edits)]
    found = drawn_apart(twice, 99, generator_of(0, 1))
    assert len({e.edit.prompt for e in found}) == len(found) == len(META_POOL.edits)
    assert apart(twice) == list(META_POOL.edits)


def test_a_batch_is_made_at_once_and_the_statistics_count_it() -> None:
    together, apart_ = editor(), editor()
    together.apply(batch_of(FACTS[:2]))
    for step, event in enumerate(FACTS[:2], 1):
        apart_.apply(batch_of([event], step))
    assert together.sizes == (sum(apart_.sizes),)
    assert not all(torch.equal(a, b) for a, b in zip(together.changes, apart_.changes))
    rows = torch.cat([together.rows.h[0], together.rows.g[0]], -1)
    counted = together.network.counted()[0].with_rows(rows)
    assert together.statistics[0].n == counted.n
    torch.testing.assert_close(together.statistics[0].mean, counted.mean)
    still = editor(lifelong=False)
    still.apply(batch_of(FACTS[:2]))
    assert still.statistics[0].n == still.network.counted()[0].n
    assert together._key(META_POOL.edits) == still._key(META_POOL.edits)


def test_undo_is_exact_whatever_is_taken_out() -> None:
    """The newest edit leaves the weights before it; an older one leaves what the others' rows give."""
    whole = editor()
    for step, event in enumerate(FACTS[:2], 1):
        whole.apply(batch_of([event], step))
    before, state = frozen(whole.edited_weights()), frozen(whole.state_dict())
    whole.apply(batch_of(FACTS[2:], 3))
    whole.revert([FACTS[2].id])
    assert all(torch.equal(w, before[n]) for n, w in whole.edited_weights().items())
    assert all(torch.equal(v, state[k]) for k, v in whole.state_dict().items() if isinstance(v, torch.Tensor))
    whole.revert([FACTS[0].id, FACTS[1].id])
    assert all(torch.equal(w, build("llama").parameter(n)) for n, w in whole.edited_weights().items())
    with pytest.raises(BadEditor, match="made no edit"):
        whole.revert([FACTS[0].id])


def test_network_and_model_stay_as_they_are_while_edits_are_made() -> None:
    made = editor()
    before = frozen(made.network.state())
    for step, event in enumerate(FACTS, 1):
        assert not made.apply(batch_of([event], step)).failed
    assert equal_states(before, made.network.state())
    assert float(before["net.n.0"]) > 2


def test_train_edits_are_needed_and_the_training_is_said() -> None:
    with pytest.raises(BadEditor, match="learns to edit from train edits, and the stream has 0 usable ones"):
        editor(pool=TrainPool())
    (note,) = [n for n in editor().notes if n.startswith("meta-training on ")]
    assert "loss on held-out edits by step 0: " in note


def test_malmen_is_a_training_of_its_own() -> None:
    long, short = editor(), editor(trajectory=1)
    assert long._key(META_POOL.edits) != short._key(META_POOL.edits)
    assert not short.apply(batch_of(FACTS)).failed
