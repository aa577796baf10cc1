"""Restraints with error feedback, and the null space that shrinks: laws in float64, and editors against their hosts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from testbed.core.events import EditBatch
from testbed.core.registry import UnknownName
from testbed.editors.base import EditFailed
from testbed.editors.locate.aligned import Aligned
from testbed.editors.locate.rect import sparse
from testbed.editors.locate.solver import IdentityPrior, NullSpacePrior, Prior, Ridge, SecondMomentPrior, ShrinkingRidge
from testbed.experiment.config import RunConfig, stored_config
from tests.helpers.facts import FACTS, make

F, D = 12, 7


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def priors(generator: torch.Generator) -> list[Prior]:
    c = normal(generator, F, 3 * F)
    basis = torch.linalg.qr(normal(generator, F, 3))[0]
    return [IdentityPrior(0.7), SecondMomentPrior(c @ c.T, 0.5, 1e-4), NullSpacePrior(basis, 0.4)]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 3), min_size=1, max_size=5))
def test_rows_times_the_system_and_back_are_those_of_the_plain_matrix(seed: int, batches: list[int]) -> None:
    """Whether the past is kept in factors or, past half of the width, as a sum."""
    g = torch.Generator().manual_seed(seed)
    rows = normal(g, D, F)
    for prior in priors(g):
        ridge, system = Ridge(prior, history=True), prior.rho * torch.eye(F, dtype=torch.float64)
        for n in batches:
            keys = normal(g, n, F)
            ridge.append(keys)
            white = prior.whiten(keys.T)
            system = system + white @ white.T
        torch.testing.assert_close(ridge.multiplied(rows), rows @ system, atol=1e-10, rtol=1e-9)
        torch.testing.assert_close(ridge.divided(rows), torch.linalg.solve(system, rows.T).T, atol=1e-8, rtol=1e-8)
        inside = prior.unwhiten(prior.rewhiten(rows.T)).T
        allowed = rows if not prior.excluded else prior.whiten(rows.T).T
        torch.testing.assert_close(inside, allowed, atol=1e-8, rtol=1e-8)


def one_after_the_other(restrain: Any, feedback: bool, history: bool = True, batches: int = 60) -> tuple[Tensor, Tensor]:
    """The sum of restrained changes by the plain equations of the module, and the one ridge solve over all edits."""
    g, wide, rows = torch.Generator().manual_seed(3), 48, 16
    base, gram = torch.eye(wide, dtype=torch.float64), torch.zeros(wide, wide, dtype=torch.float64)
    weight, total, error, wanted = normal(g, rows, wide), torch.zeros(rows, wide, dtype=torch.float64), 0.0, 0.0
    for _ in range(batches):
        keys, values = normal(g, wide, 2), normal(g, rows, 2)
        c = base + keys @ keys.T + (gram if history else 0.0)
        change = torch.linalg.solve(c, ((values - total @ keys) @ keys.T - (error if feedback else 0.0)).T).T
        made = restrain(change, weight + total)
        total, gram, error = total + made, gram + keys @ keys.T, (made - change) @ c
        wanted = wanted + values @ keys.T
    return total, torch.linalg.solve(base + gram, wanted.T).T  # type: ignore[union-attr]


def test_feedback_brings_a_restrained_sequence_to_the_one_shot_solution() -> None:
    def away(*form: bool) -> float:
        got, want = one_after_the_other(lambda change, weight: sparse(change, weight, 0.4), *form)
        return float((got - want).norm() / want.norm())

    naive, history, fed_back = away(False, False), away(False), away(True)
    assert fed_back < history / 3 < naive / 3
    whole, want = one_after_the_other(lambda change, weight: change, True)
    torch.testing.assert_close(whole, want, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("name", "whole"), [("memit-seq+rect", {"keep": 1.0}), ("alphaedit+rect", {"keep": 1.0}), ("memit-seq+prune", {})])
def test_without_a_restraint_it_is_its_host(name: str, whole: dict[str, Any]) -> None:
    host, editor = make(name.partition("+")[0]), make(name, **whole)
    for step, event in enumerate(FACTS, 1):
        for e in (host, editor):
            assert not e.apply(EditBatch((event,), step)).failed
    assert isinstance(editor, Aligned)
    assert all(not e.any() for e in editor.errors.values())
    for a, b in zip(host.edited_weights().values(), editor.edited_weights().values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_the_editor_feeds_back_what_its_restraint_took_away() -> None:
    """By the equations, with dense matrices, from the solutions of the host's own solve."""
    editor: Any = make("memit-seq+rect", keep=0.3)
    solved: list[tuple[int, Tensor, Tensor]] = []
    solve = editor._solve

    def watched(layer: int, keys: Tensor, residual: Tensor, bare: Tensor) -> Any:
        solved.append((layer, keys.double(), residual.double()))
        return solve(layer, keys, residual, bare)

    editor._solve = watched
    before = {}
    for step, event in enumerate(FACTS, 1):
        editor.apply(EditBatch((event,), step))
        for layer, keys, residual in solved:
            root = editor.priors[layer]._root
            a0, error, past, weight = before.get(layer, (root @ root.T, 0.0, 0.0, editor.deltas.base(layer)))
            c = a0 + past + keys.T @ keys
            change = torch.linalg.solve(c, (residual.T @ keys - error).T).T
            made = sparse(change, weight, 0.3)
            weight = weight + made.float()
            torch.testing.assert_close(editor.deltas.weight(layer), weight, atol=2e-5, rtol=1e-4)
            before[layer] = (a0, (made - change) @ c, past + keys.T @ keys, editor.deltas.weight(layer))
        solved.clear()
    assert any(e.any() for e in editor.errors.values())


def test_hosts_without_past_keys_or_without_a_ridge_are_told_what_to_take() -> None:
    assert "set history=true, take memit-seq" in "\n".join(RunConfig(editor=("memit+rect",)).problems())
    assert not RunConfig(editor=("memit+rect[history=true]", "memit-seq+prune", "alphaedit+rect", "rome+rect-naive")).problems()
    with pytest.raises(UnknownName, match="rome solves otherwise"):
        RunConfig(editor=("rome+rect",)).resolve_editor("rome+rect")


def test_a_stored_run_of_the_naive_form_goes_on_as_that(tmp_path: Path) -> None:
    """Its manifest lacks the field `feedback`."""
    config = {"editor": ["memit+rect", "memit-seq+rect", "memit"], "set": ["memit+rect.keep=0.2"]}
    aligned = vars(RunConfig().resolve_editor("memit-seq+rect").config)
    stored = {"memit+rect": {k: None for k in aligned if k != "feedback"}, "memit-seq+rect": dict.fromkeys(aligned), "memit": {}}
    (tmp_path / "manifest.json").write_text(json.dumps({"config": config, "editor_configs": stored}))
    found = stored_config(tmp_path).resolve().editors
    old, new = found["memit+rect"], found["memit-seq+rect"]
    assert (old.cls.name, new.cls.name) == ("memit+rect", "memit-seq+rect")
    assert not issubclass(old.cls, Aligned) and issubclass(new.cls, Aligned)
    assert old.config.keep == 0.2
    assert "goes on as memit+rect-naive" in old.note and not new.note


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 2), min_size=1, max_size=4))
def test_a_space_that_shrinks_leaves_every_earlier_answer_as_it_is(seed: int, batches: list[int]) -> None:
    g = torch.Generator().manual_seed(seed)
    ridge = ShrinkingRidge(NullSpacePrior(torch.linalg.qr(normal(g, F, 2))[0], 0.1))
    past, weight = torch.zeros(0, F, dtype=torch.float64), torch.zeros(D, F, dtype=torch.float64)
    for n in batches:
        keys, residual = normal(g, n, F), normal(g, n, D)
        answers = weight @ past.T
        solution = ridge.solve(keys, residual)
        weight = weight + solution.left.T @ solution.right
        torch.testing.assert_close(weight @ past.T, answers, atol=1e-9, rtol=1e-9)
        assert torch.linalg.norm(solution.left.T @ solution.right) > 0
        ridge.append(keys)
        ridge.append(keys)  # again: it adds no direction
        past = torch.cat([past, keys])
        assert ridge.space.excluded == 2 + len(past)
        eye = torch.eye(ridge.space.excluded, dtype=torch.float64)
        torch.testing.assert_close(ridge.space.basis.T @ ridge.space.basis, eye, atol=1e-9, rtol=0)


def test_a_space_that_is_used_up_says_so_and_the_first_batch_is_alphaedits() -> None:
    ridge = ShrinkingRidge(NullSpacePrior(torch.zeros(F, 0), 0.1))
    ridge.append(torch.eye(F))
    with pytest.raises(EditFailed, match="none is left"):
        ridge.solve(torch.ones(1, F), torch.ones(1, D))
    assert "leave projector and history on" in "\n".join(RunConfig(editor=("alphaedit[shrink=true,history=false]",)).problems())
    plain, shrinking = make("alphaedit"), make("alphaedit", shrink=True)
    for e in (plain, shrinking):
        e.apply(EditBatch((FACTS[0],), 1))
    for a, b in zip(plain.edited_weights().values(), shrinking.edited_weights().values(), strict=True):
        assert torch.equal(a, b)
    again = make("alphaedit", shrink=True)
    again.load_state_dict(shrinking.state_dict())
    for e in (again, shrinking):
        e.apply(EditBatch((FACTS[1],), 2))
    for a, b in zip(again.edited_weights().values(), shrinking.edited_weights().values(), strict=True):
        assert torch.equal(a, b)
