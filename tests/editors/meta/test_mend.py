"""MEND: the gradient in two factors, the network against a plain one, and how edits and trainings behave."""

from __future__ import annotations

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
from testbed.core.events import Ask, EditEvent
from testbed.editors.adapters.lowrank import find_target_modules
from testbed.editors.base import BadEditor
from testbed.editors.meta.examples import drawn, examples_of, generator_of
from testbed.editors.meta.gradients import GradientFactors, factors_of, hooked_forward
from testbed.editors.meta.mend import Mend, MendConfig, derived
from testbed.editors.meta.mend_network import MendNetwork
from testbed.editors.meta.mend_training import MendTask
from testbed.model.handle import as_stored
from tests.helpers.facts import FACTS, META_POOL
from tests.helpers.models import build
from tests.reference import mend as plain

BRIEF: dict[str, Any] = {"train_steps": 2, "judge_every": 2, "train_batch": 4}
KINDS = ["llama", "gpt2"]
ASKS, ANSWERS = [e.ask() for e in FACTS], [e.target for e in FACTS]


@cache
def targets(kind: str) -> Any:
    handle = build(kind)
    return find_target_modules(handle, str(derived(handle)["modules"]))


def editor(kind: str = "llama", **config: Any) -> Mend:
    made = Mend(MendConfig(**{**BRIEF, **config}))
    made.prepare(build(kind), META_POOL)
    return made


def random_network(kind: str, rank: int = 4, at_once: int = 1) -> MendNetwork:
    """A network with every tensor drawn, so that no part of an equation is the identity."""
    h = MendConfig(rank=rank, alpha=1e-3, edits_at_once=at_once)
    found, generator = MendNetwork.fresh(build(kind), targets(kind), h), torch.Generator().manual_seed(5)
    for of in (found.tensors, found.statistics):
        for name, t in of.items():
            drawn = 0.3 * torch.randn(t.shape, generator=generator)
            of[name] = (drawn.abs() + 0.5 if name.startswith(("dev", "s")) else drawn).requires_grad_(t.requires_grad)  # type: ignore[index]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_factors_product_is_the_gradient(kind: str) -> None:
    """Equation 1, row by row, in a padded batch, against autograd through the whole model."""
    handle = build(kind)
    for target, factors in zip(targets(kind), factors_of(handle, targets(kind), ASKS, ANSWERS)):
        for row, (ask, answer) in enumerate(zip(ASKS, ANSWERS)):
            product = factors.delta[row].T @ factors.u[row]
            expected = plain.gradient(handle, target.module, target.weight, ask, answer)
            # both sides round sums over positions, so that an entry near zero errs by the scale of the largest
            torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_row_does_not_depend_on_the_others_and_padding_counts_nothing() -> None:
    handle = build("llama")
    alone = factors_of(handle, targets("llama"), ASKS[1:2], ANSWERS[1:2])
    for one, all_of_them in zip(alone, factors_of(handle, targets("llama"), ASKS, ANSWERS)):
        n = int(one.kept.sum())
        assert int(all_of_them.kept[1].sum()) == n
        torch.testing.assert_close(one.delta[0][one.kept[0]], all_of_them.delta[1][all_of_them.kept[1]], rtol=1e-4, atol=1e-6)
        assert not all_of_them.u[~all_of_them.kept].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_network_takes_a_step_down_the_gradient(kind: str) -> None:
    """Without normalisation and before training, equation 4 is -alpha times the gradient."""
    handle = build(kind)
    network = MendNetwork.fresh(handle, targets(kind), MendConfig(rank=4, alpha=0.01))
    changes = network.changed(factors_of(handle, targets(kind), ASKS[:1], ANSWERS[:1]))
    for target, (left, right) in zip(targets(kind), changes):
        found = (right[0].mT @ left[0]).detach()
        wanted = -0.01 * plain.gradient(handle, target.module, target.weight, ASKS[0], ANSWERS[0])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-8)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 4))
def test_the_network_is_the_plain_one(seed: int, positions: int) -> None:
    """Equations 2 to 4 with drawn weights, against loops in float64."""
    network, i = random_network("llama"), 0
    generator = torch.Generator().manual_seed(seed)
    t = targets("llama")[i]
    u, delta = (torch.randn(1, positions, n, generator=generator) for n in (t.f, t.d))
    factors = GradientFactors(u, delta, torch.ones(1, positions, dtype=torch.bool))
    left, right = network._of_weight(i, factors)
    net = {n: x.detach().double().numpy() for n, x in {**network.tensors, **network.statistics}.items()}
    wanted = plain.change(net, i, network.shapes[i], u[0].double().numpy(), delta[0].double().numpy())
    np.testing.assert_allclose((right[0].mT @ left[0]).detach().numpy(), wanted, rtol=2e-3, atol=1e-5)


def test_edits_at_once_add_up_and_do_not_mix() -> None:
    """The change of two edits at once is the sum of both alone, whose rank is at most the number of positions."""
    handle, network = build("llama"), random_network("llama")
    pair, factors = random_network("llama", at_once=2), factors_of(handle, targets("llama"), ASKS, ANSWERS)
    for of, (left, right), (one, of_one) in zip(factors, pair.changed(factors), network.changed(factors)):
        assert len(left) == 2  # three edits: a pair, and one with nothing beside it
        both = of_one[0].mT @ one[0] + of_one[1].mT @ one[1]
        torch.testing.assert_close(right[0].mT @ left[0], both, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(right[1].mT @ left[1], of_one[2].mT @ one[2], rtol=1e-4, atol=1e-6)
        assert int(torch.linalg.matrix_rank((of_one[0].mT @ one[0]).detach())) <= int(of.kept[0].sum())


@pytest.mark.parametrize("kind", KINDS)
def test_a_rows_low_rank_addition_is_the_changed_weight(kind: str) -> None:
    handle, rows = build(kind), targets(kind)
    network = random_network(kind)
    changes = network.changed(factors_of(handle, rows, ASKS, ANSWERS))
    task = MendTask(handle, rows, network, examples_of(handle, META_POOL.edits, 0.1), MendConfig())
    with torch.no_grad():
        found = hooked_forward(handle, rows, ASKS, ANSWERS).losses(task._adds(changes, len(ASKS)))
        for row in range(len(ASKS)):
            built = {
                t.weight: handle.parameter(t.weight) + as_stored(t.module, right[row].mT @ left[row])
                for t, (left, right) in zip(rows, changes)
            }
            with handle.swapped(built):
                alone = hooked_forward(handle, rows, ASKS[row : row + 1], ANSWERS[row : row + 1]).losses([])
            torch.testing.assert_close(found[row], alone[0], rtol=1e-4, atol=1e-4)


def test_the_outer_gradient_is_that_of_finite_differences() -> None:
    handle, network = build("llama"), random_network("llama")
    task = MendTask(handle, targets("llama"), network, examples_of(handle, META_POOL.edits, 0.1), MendConfig(train_batch=3))
    alpha = network.tensors["alpha.2"]
    (found,) = torch.autograd.grad(task.loss(generator_of(0, 1)), [alpha])
    values, size = [], 1e-3
    for sign in (1, -1):
        with torch.no_grad():
            alpha += sign * size
            values.append(float(task.loss(generator_of(0, 1))))
            alpha -= sign * size
    assert float(found) == pytest.approx((values[0] - values[1]) / (2 * size), rel=0.03, abs=1e-3)


def test_the_inner_gradient_is_taken_as_it_stands() -> None:
    """Nothing but the network learns: neither factor carries a gradient."""
    for factors in factors_of(build("llama"), targets("llama"), ASKS, ANSWERS):
        assert not factors.u.requires_grad
        assert not factors.delta.requires_grad


def test_statistics_and_network_stay_as_trained_while_edits_are_made() -> None:
    mend = editor()
    before = frozen(mend.network.state())
    for step, event in enumerate(FACTS, 1):
        assert not mend.apply(batch_of([event], step)).failed
    assert equal_states(before, mend.network.state())
    assert float(before["net.dev.0"].std()) > 0


def batch_of(events: list[EditEvent], step: int = 1) -> Any:
    class Nothing:
        def paraphrases(self, event: EditEvent) -> tuple[str, ...]:
            return ()

    return batch(Nothing(), events, step)  # type: ignore[arg-type]


def test_without_a_step_size_nothing_changes() -> None:
    mend = editor()
    mend.network = mend.network.with_tensors({n: t * (not n.startswith("alpha")) for n, t in mend.network.tensors.items()})
    base = {t.weight: build("llama").parameter(t.weight) for t in mend.targets}
    assert not mend.apply(batch_of(FACTS)).failed
    assert all(torch.equal(w, base[n]) for n, w in mend.edited_weights().items())


def test_each_edit_of_a_batch_is_made_on_the_weights_that_the_one_before_it_left() -> None:
    together, apart = editor(), editor()
    together.apply(batch_of(FACTS[:2]))
    for step, event in enumerate(FACTS[:2], 1):
        apart.apply(batch_of([event], step))
    assert all(torch.equal(a, b) for a, b in zip(together.weights, apart.weights))


def test_train_edits_are_needed() -> None:
    with pytest.raises(BadEditor, match="learns to edit from train edits, and the stream has 0 usable ones of 0 entities"):
        Mend(MendConfig(**BRIEF)).prepare(build("llama"), TrainPool())


def test_no_entity_is_trained_on_and_held_out() -> None:
    found = examples_of(build("llama"), META_POOL.edits, 0.3)
    assert {e.event.subject for e in found.train}.isdisjoint({e.event.subject for e in found.held_out})
    assert len(found.train) + len(found.held_out) == len(META_POOL.edits)
    one, two = (drawn(found.train, 3, generator_of(1, 2)) for _ in range(2))
    assert one == two
    assert all(e.rephrasing.prompt != e.edit.prompt for e in one)


def test_an_edit_that_the_model_cannot_answer_is_left_out_and_counted() -> None:
    first = META_POOL.edits[0]
    long = replace(first, event=replace(first.event, prompt="so " * 900, id=""))
    found = examples_of(build("llama"), [*META_POOL.edits, long], 0.3)
    assert found.left_out == 1
    assert "1 that the model cannot read left out" in found.summary


def test_it_trains_again_on_the_edited_model_and_goes_on_from_a_state() -> None:
    config = {"retrain": True, "retrain_after": 2, "retrain_steps": 1}
    mend, other = editor(**config), editor(**config)
    assert torch.equal(mend.network.tensors["alpha.0"], other.network.tensors["alpha.0"])
    mend.apply(batch_of(FACTS[:2]))
    before, state = mend.network, mend.state_dict()
    report = mend.apply(batch_of(FACTS[2:], 2))
    assert {"retrained_from", "retrained_to"} <= set(report.notes)
    assert report.notes["retrained_to"] <= report.notes["retrained_from"]
    assert mend.since == 1
    other.load_state_dict(state)
    assert all(torch.equal(t, other.network.tensors[n]) for n, t in before.tensors.items())
    other.apply(batch_of(FACTS[2:], 2))
    assert equal_states(mend.state_dict(), other.state_dict())


def test_the_training_is_said_with_its_curve_and_depends_on_no_seed_of_the_run() -> None:
    mend = editor()
    (note,) = [n for n in mend.notes if n.startswith("meta-training on ")]
    assert "loss on held-out edits by step 0: " in note
    again = Mend(MendConfig(**BRIEF), seed=9)
    again.prepare(build("llama"), META_POOL)
    assert again._key(META_POOL.edits) == mend._key(META_POOL.edits)
    changed = Mend(MendConfig(**{**BRIEF, "c_edit": 0.2}))
    changed.bind(build("llama"))
    assert changed._key(META_POOL.edits) != mend._key(META_POOL.edits)


def test_an_ask_without_an_answer_is_judged_by_the_next_token() -> None:
    forward = hooked_forward(build("llama"), targets("llama"), [Ask("what colour is the lamp?")], [""])
    assert int(forward.batch.before_answer.sum()) == 1
