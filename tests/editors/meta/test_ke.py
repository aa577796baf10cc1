"""KE: its network and its change against plain ones, the constrained training, and how edits are made and undone."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.base import TrainPool
from testbed.checks.editors import batch, equal_states, frozen
from testbed.core.events import EditEvent
from testbed.editors.adapters.lowrank import find_target_modules
from testbed.editors.base import BadEditor
from testbed.editors.meta.examples import drawn_apart, examples_of, generator_of
from testbed.editors.meta.gradients import factors_of
from testbed.editors.meta.ke import KE, KEConfig
from testbed.editors.meta.ke_network import ConditionedNetwork, embedded_conditions
from testbed.editors.meta.ke_training import KETask, condition_of, smoothed
from testbed.editors.meta.mend import derived
from testbed.model.handle import as_matrix
from tests.helpers.facts import FACTS, META_POOL
from tests.helpers.models import build
from tests.reference import ke as plain
from tests.reference.mend import gradient

BRIEF: dict[str, Any] = {"train_steps": 2, "judge_every": 2, "train_batch": 4, "hidden": 8, "condition": 12}
KINDS = ["llama", "gpt2"]
KNOWN = [replace(e, previous=old, id="") for e, old in zip(FACTS, ("Old Tom", "a blue gate", "red"))]
ASKS, ANSWERS = [e.ask() for e in KNOWN], [e.target for e in KNOWN]
TEXTS = ["Old Tom >> Mara Venn || Who leads the northern harbour now?", "red >> green || Who?", "a blue gate >> two red towers || Zor"]


@cache
def targets(kind: str) -> Any:
    handle = build(kind)
    return find_target_modules(handle, str(derived(handle)["modules"]))


def editor(kind: str = "llama", **config: Any) -> KE:
    made = KE(KEConfig(**{**BRIEF, **config}))
    made.prepare(build(kind), META_POOL)
    return made


def network(kind: str = "llama", **config: Any) -> ConditionedNetwork:
    return ConditionedNetwork.fresh(build(kind), targets(kind), KEConfig(**{**BRIEF, **config}))


def task(kind: str = "llama", **config: Any) -> KETask:
    handle, h = build(kind), KEConfig(**{**BRIEF, **config})
    return KETask(handle, targets(kind), network(kind, **config), examples_of(handle, META_POOL.edits, 0.1), h)


def changes(net: ConditionedNetwork, texts: list[str], kind: str = "llama") -> list[torch.Tensor]:
    """(B, d, f) by target."""
    factors = factors_of(build(kind), targets(kind), ASKS[: len(texts)], ANSWERS[: len(texts)])
    pairs = net.changed(net.condition(*embedded_conditions(build(kind), texts)), factors)
    return [(right.mT @ left).detach() for left, right in pairs]


def batch_of(events: list[EditEvent], step: int = 1) -> Any:
    class Nothing:
        def paraphrases(self, event: EditEvent) -> tuple[str, ...]:
            return ()

    return batch(Nothing(), events, step)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_the_condition_is_that_of_torchs_lstm_and_padding_changes_nothing(kind: str) -> None:
    handle, net = build(kind), network(kind)
    found = net.condition(*embedded_conditions(handle, TEXTS))
    for row, text in zip(found, TEXTS):
        embedded, _ = embedded_conditions(handle, [text])
        torch.testing.assert_close(row, plain.condition(net.tensors, embedded[0]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_change_is_the_papers_with_the_whole_gradient(kind: str) -> None:
    """Equation 2's factors against equation 1, with the gradient of autograd through the whole model."""
    handle, net = build(kind), network(kind, start=3.0)
    conditions = net.condition(*embedded_conditions(handle, TEXTS))
    for i, (t, found) in enumerate(zip(targets(kind), changes(net, TEXTS, kind))):
        for row in range(len(TEXTS)):
            whole = gradient(handle, t.module, t.weight, ASKS[row], ANSWERS[row])
            wanted = plain.change(net.tensors, i, conditions[row], whole, net.s)
            torch.testing.assert_close(found[row], wanted.detach(), rtol=1e-3, atol=1e-6 * float(wanted.detach().abs().max()) + 1e-8)


def test_without_the_offset_a_change_is_the_shaped_gradient_alone() -> None:
    net = network()
    alone, both = changes(replace(net, offset=False), TEXTS), changes(net, TEXTS)
    shaped = net.shaping(net.condition(*embedded_conditions(build("llama"), TEXTS)))
    for less, whole, of in zip(alone, both, shaped):
        offset = of.size[:, None, None] * of.rows_b[:, :, None] * of.columns_b[:, None]
        torch.testing.assert_close(whole - less, offset.detach(), rtol=1e-3, atol=1e-6)
    made = editor(offset=False)
    assert not made.apply(batch_of(KNOWN[:1])).failed


def test_without_size_nothing_changes() -> None:
    net = replace(network(), s=0.0)
    assert not any(c.any() for c in changes(net, TEXTS))


@settings(max_examples=5, deadline=None)
@given(st.floats(1e-3, 4.0), st.floats(0.0, 5.0), st.integers(0, 99))
def test_no_entry_changes_by_more_than_its_bound(s: float, start: float, seed: int) -> None:
    """|Delta W| <= s (max |c_a| |grad W| + max |c_b|), because both softmaxes stay under 1."""
    net = network(scale=s, start=start, train_seed=seed)
    shaped = net.shaping(net.condition(*embedded_conditions(build("llama"), TEXTS)))
    for t, of, found in zip(targets("llama"), shaped, changes(net, TEXTS)):
        for row in range(len(TEXTS)):
            whole = gradient(build("llama"), t.module, t.weight, ASKS[row], ANSWERS[row]).abs()
            bound = s * (of.columns_a[row].abs().max() * whole + of.columns_b[row].abs().max())
            assert bool((found[row].abs() <= bound.detach() * (1 + 1e-4) + 1e-7).all())
            assert float(of.size[row].detach()) < s
            assert float(of.rows_a[row].detach().sum()) == pytest.approx(1.0, abs=1e-5)


def test_the_condition_is_used() -> None:
    """Old and new answer in each other's place make another change of the same gradient."""
    net = network()
    one, other = (changes(net, [text])[0] for text in ("red >> green || Who?", "green >> red || Who?"))
    assert float((one - other).abs().max()) > 1e-6
    first, second = (editor() for _ in range(2))
    first.apply(batch_of(KNOWN[:1]))
    second.apply(batch_of([replace(KNOWN[0], previous="the bridge", id="")]))
    assert not all(torch.equal(a, b) for a, b in zip(first.changes, second.changes))


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0, 1.5, 40.0])
def test_the_multiplier_rises_where_the_divergence_is_over_the_margin_and_nowhere_else(kept: float) -> None:
    found = task(margin=1.0)
    for history in ([], [9.0] * 5, [0.0] * 5):  # whatever was before
        for x in history:
            found.ascend(x)
        found.multiplier.fill_(1.0)
        found.ascend(kept)
        assert (float(found.multiplier) > 1.0) == (kept > 1.0)
        assert (float(found.multiplier) < 1.0) == (kept < 1.0)
    for _ in range(500):
        found.ascend(0.0)
    assert float(found.multiplier) == 0.0


def test_the_loss_is_the_lagrangian_and_moves_the_multiplier_by_its_own_violation() -> None:
    found = task(others=2)
    outcome = found.outcome(drawn_apart(found.examples.train, 4, generator_of(0, 1)))
    assert len(outcome.nats) == 8  # each edit and its rephrasing
    assert len(outcome.kept) == 8  # two other edits of each
    found.multiplier.fill_(3.0)
    wanted = float(outcome.nats.mean()) + 3.0 * (float(outcome.kept.mean()) - found.h.margin)
    assert float(found.loss(generator_of(0, 1)).detach()) == pytest.approx(wanted, rel=1e-4)
    assert (float(found.multiplier) > 3.0) == (float(outcome.kept.mean()) > found.h.margin)


def test_the_gradient_is_that_of_finite_differences() -> None:
    found = task(start=2.0)
    examples = drawn_apart(found.examples.train, 3, generator_of(0, 1))

    def lagrangian() -> torch.Tensor:
        outcome = found.outcome(examples)
        return outcome.nats.mean() + 2.0 * outcome.kept.mean()

    for name in ("head.0.1.bias", "condition.bias", "lstm.backward.state", "head.1.0.size"):
        leaf = found.network.tensors[name]
        (grad,) = torch.autograd.grad(lagrangian(), [leaf])
        direction = grad / grad.norm()
        values, size = [], 0.05
        for sign in (1, -1):
            with torch.no_grad():
                leaf += sign * size * direction
                values.append(float(lagrangian()))
                leaf -= sign * size * direction
        assert float(grad.norm()) == pytest.approx((values[0] - values[1]) / (2 * size), rel=0.05, abs=2e-4), name


def test_the_margin_shrinks_where_held_out_edits_succeed_and_not_below_its_least() -> None:
    found = task(margin=0.5, least_margin=0.4)
    found.judge()
    assert float(found.margin) == 0.5  # an untrained network on a random model
    whole = found.outcome
    found.outcome = lambda batch: whole(batch)._replace(right=torch.ones(2 * len(batch), dtype=torch.bool))  # type: ignore[method-assign]
    for expected in (0.4, 0.4):
        found.judge()
        assert float(found.margin) == pytest.approx(expected)


def test_smoothing_gives_other_tokens_a_part_of_the_mass() -> None:
    log_p = torch.randn(3, 7, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    ids = torch.tensor([0, 3, 6])
    target = torch.full((3, 7), 0.1 / 6).scatter(1, ids[:, None], 0.9)
    torch.testing.assert_close(smoothed(log_p, ids, 0.1), -(target * log_p).sum(-1))
    torch.testing.assert_close(smoothed(log_p, ids, 0.0), torch.nn.functional.nll_loss(log_p, ids, reduction="none"))


@pytest.mark.parametrize("kind", KINDS)
def test_only_matrices_change(kind: str) -> None:
    made = editor(kind, modules=".")
    made.apply(batch_of(KNOWN[:1]))
    handle = build(kind)
    assert all(handle.parameter(n).ndim == 2 for n in made.edited_weights())
    assert not any("embed" in n or "wte" in n or "norm" in n or "ln_" in n for n in made.edited_weights())
    linear = {n for n, p in handle.model.named_parameters() if p.ndim == 2 and n.startswith(handle.layers_path)}
    assert set(made.edited_weights()) == linear
    assert len(made.edited_weights()) > len(editor(kind).edited_weights())


def test_each_edit_is_made_on_the_weights_that_the_one_before_left() -> None:
    together, apart = editor(), editor()
    together.apply(batch_of(KNOWN[:2]))
    for step, event in enumerate(KNOWN[:2], 1):
        apart.apply(batch_of([event], step))
    assert all(torch.equal(a, b) for a, b in zip(together.changes, apart.changes))


def test_undo_is_exact_and_takes_out_an_edits_own_change() -> None:
    made = editor()
    made.apply(batch_of(KNOWN[:2]))
    before = frozen(made.edited_weights())
    made.apply(batch_of(KNOWN[2:], 2))
    made.revert([KNOWN[2].id])
    assert all(torch.equal(w, before[n]) for n, w in made.edited_weights().items())
    made.revert([KNOWN[0].id])
    alone = made.changes
    rows = [i for i, own in enumerate(made.rows.owner) if own == KNOWN[1].id]
    assert len(rows) == len(made.rows.owner)
    for t, h, g, c in zip(made.targets, made.rows.h, made.rows.g, alone):
        assert c.shape == as_matrix(t.module, build("llama").parameter(t.weight)).shape
        torch.testing.assert_close(c, g.double().T @ h.double())
    with pytest.raises(BadEditor, match="made no edit"):
        made.revert([KNOWN[0].id])


def test_an_edit_without_an_old_answer_is_made_and_counted() -> None:
    made = editor()
    assert made.apply(batch_of(FACTS[:2])).notes["without_old_answer"] == 2.0
    assert "without_old_answer" not in made.apply(batch_of(KNOWN[2:], 2)).notes
    assert any("train edits name no old answer" in n for n in made.notes)


def test_the_network_stays_as_trained_and_a_training_reads_old_answers() -> None:
    made = editor()
    before = frozen(made.network.state())
    for step, event in enumerate(KNOWN, 1):
        assert not made.apply(batch_of([event], step)).failed
    assert equal_states(before, made.network.state())
    told = TrainPool(find_edits=lambda: tuple(replace(e, event=replace(e.event, previous="grey")) for e in META_POOL.edits))
    assert made._key(META_POOL.edits) != made._key(told.edits)
    (one,) = drawn_apart(told.edits, 1, generator_of(0, 1))
    assert condition_of(one) == f"grey >> {one.answer} || {one.edit.prompt}"
