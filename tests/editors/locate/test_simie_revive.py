"""SimIE ends at the one-shot ridge, and REVIVE leaves the leading directions alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from testbed.core.events import EditBatch, EditEvent
from testbed.core.registry import UnknownName
from testbed.editors.base import BadEditor
from testbed.editors.locate.revive import leading_directions
from testbed.editors.locate.solver import IdentityPrior, Ridge
from testbed.experiment.config import RunConfig
from tests.helpers.facts import FACTS, POOL, fact, make
from tests.helpers.models import build

F, D = 10, 6


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 3), min_size=1, max_size=6), st.floats(0.05, 5.0))
def test_a_sequence_of_exact_edits_becomes_the_ridge_over_all_of_them(seed: int, batches: list[int], lam: float) -> None:
    g = torch.Generator().manual_seed(seed)
    keys, values = normal(g, sum(batches), F), normal(g, sum(batches), D)
    first = normal(g, D, F)
    weight, recursion, at = first, Ridge(IdentityPrior(lam), history=True), 0
    for n in batches:
        k, v = keys[at : at + n], values[at : at + n]
        solution = recursion.solve(k, v - k @ weight.T)
        weight, at = weight + solution.left.T @ solution.right, at + n
        recursion.append(k)
    at_once = first + torch.linalg.solve(keys.T @ keys + lam * torch.eye(F, dtype=torch.float64), keys.T @ (values - keys @ first.T)).T
    torch.testing.assert_close(weight, at_once, atol=1e-8, rtol=1e-8)


def watched(editor: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(keys, what the host's change does there, the weight before) of each solve; the host's own solve is made exact."""
    from testbed.editors.locate.core import LocateEditor

    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    solve = editor._solve

    def watch(layer: int, keys: Tensor, residual: Tensor, bare: Tensor) -> Any:
        host = LocateEditor._solve(editor, layer, keys, residual, bare)
        seen.append((keys.double(), (keys.double() @ host.right.T) @ host.left, editor.deltas.weight(layer).double()))
        return solve(layer, keys, residual, bare)

    editor._solve = watch
    return seen


@pytest.mark.parametrize("host", ["memit", "memit-seq", "alphaedit"])
def test_the_editor_ends_at_the_ridge_over_what_its_host_wrote(host: str) -> None:
    """In the first layer, whose keys no edit changes: W_T - W_0 = V K^T (K K^T + lambda I)^-1 with V against the unedited weight."""
    editor: Any = make(f"{host}+simie", layers=(0,))
    seen = watched(editor)
    for step, event in enumerate(FACTS, 1):
        assert not editor.apply(EditBatch((event,), step)).failed
    base = editor.deltas.base(0).double()
    keys = torch.cat([k for k, _, _ in seen])
    wanted = torch.cat([made + k @ (before - base).T for k, made, before in seen])
    lam = 0.1 * float(seen[0][0].square().sum(1).mean())
    ridge = torch.linalg.solve(keys.T @ keys + lam * torch.eye(keys.shape[1], dtype=torch.float64), keys.T @ wanted).T
    torch.testing.assert_close(editor.deltas.weight(0).double() - base, ridge, atol=2e-5, rtol=1e-4)


def test_what_an_editor_wrote_earlier_holds_better_with_simie() -> None:
    """Two prompts of one subject have nearly one key; the second edit alone would overwrite the first."""
    events = [fact("the old bridge", "green"), EditEvent("add", 1.0, 0, "Who painted the old bridge now?", "red", subject="the old bridge")]

    def first_is_left(name: str) -> float:
        editor = make(name, steps=15)
        editor.apply(EditBatch((events[0],), 1))
        before = float(editor.predictor().score([events[0].ask()], [events[0].target])[0].logprobs.mean())
        editor.apply(EditBatch((events[1],), 2))
        return float(editor.predictor().score([events[0].ask()], [events[0].target])[0].logprobs.mean()) - before

    assert first_is_left("memit+simie") > first_is_left("memit") - 1e-6


def test_a_fact_that_changes_again_leaves_the_recursion_and_a_loaded_state_goes_on_alike() -> None:
    editor: Any = make("memit+simie", layers=(0,))
    for step, event in enumerate(FACTS, 1):
        editor.apply(EditBatch((event,), step))
    again = fact("Zor", "a blue square", source="again")
    resumed: Any = make("memit+simie", layers=(0,))
    resumed.load_state_dict(editor.state_dict())
    for e in (editor, resumed):
        assert not e.apply(EditBatch((again,), 4)).failed
    assert editor._recursions[0].past.shape[0] == 3
    torch.testing.assert_close(editor.deltas.weight(0), resumed.deltas.weight(0), atol=1e-6, rtol=1e-6)
    assert float(editor.predictor().score([again.ask()], [again.target])[0].logprobs.mean()) > float(
        make("memit").predictor().score([again.ask()], [again.target])[0].logprobs.mean()
    )


@pytest.mark.parametrize("name", ["memit+revive", "memit-seq+revive", "alphaedit+revive", "rome+revive"])
def test_leading_directions_are_left_alone_on_both_sides(name: str) -> None:
    editor: Any = make(name, tau=0.5)
    for step, event in enumerate(FACTS, 1):
        assert not editor.apply(EditBatch((event,), step)).failed
    for layer in editor.deltas.layers:
        base = editor.deltas.base(layer)
        u, v = leading_directions(editor.handle, editor.deltas.names[layer], base, 0.5)
        assert 0 < u.shape[1] < min(base.shape) and float(base.double().square().sum()) > 0
        change = editor.deltas.left[layer].double().T @ editor.deltas.right[layer].double()
        assert float(change.norm()) > 0
        assert float((u.T @ change).norm() / change.norm()) < 1e-6
        assert float((change @ v).norm() / change.norm()) < 1e-6
        energy = torch.linalg.svdvals(base.double()).square()
        assert float(energy[: u.shape[1]].sum()) >= 0.5 * float(energy.sum()) > float(energy[: u.shape[1] - 1].sum())


def test_tau_zero_is_the_host_and_all_of_it_writes_nothing() -> None:
    host, none, every = make("memit-seq"), make("memit-seq+revive", tau=0.0), make("memit-seq+revive", tau=1.0)
    for e in (host, none, every):
        e.apply(EditBatch((FACTS[0],), 1))
    for a, b in zip(host.edited_weights().values(), none.edited_weights().values(), strict=True):
        assert torch.equal(a, b)
    base = build("llama")
    assert all(torch.allclose(w, base.parameter(n).float(), atol=1e-5) for n, w in every.edited_weights().items())
    with pytest.raises(UnknownName, match="solves otherwise"):
        RunConfig(editor=("memit+simie+prune",)).resolve_editor("memit+simie+prune")
    assert not RunConfig(editor=("memit+simie+rect-naive", "memit-seq+revive+rect", "rome+simie")).problems()


@pytest.mark.parametrize("name", ["memit", "memit-seq+simie", "memit-seq+revive", "memit-seq+rect", "alphaedit[shrink=true]"])
def test_nothing_left_to_write_and_edits_of_one_key_have_their_rules(name: str) -> None:
    """A residual of zero writes nothing; edits of other facts with one key are made, at finite weights, and counted."""
    resolved = RunConfig().resolve_editor(name)
    settled: Any = resolved.cls(dataclasses.replace(resolved.config, contexts=0, steps=3))
    settled.prepare(build("llama"), POOL)
    settled._residual = lambda computation, target, keys: torch.zeros_like(target)
    assert not settled.apply(EditBatch((FACTS[0],), 1)).failed
    for n, w in settled.edited_weights().items():
        assert torch.equal(w, build("llama").parameter(n).float())
    alike = [
        EditEvent("add", 1.0, i, FACTS[1].prompt, t, subject="Zor", relation=str(i), source=str(i)) for i, t in enumerate(("red", "blue"))
    ]
    again: Any = resolved.cls(dataclasses.replace(resolved.config, contexts=0, steps=3))
    again.prepare(build("llama"), POOL)
    report = again.apply(EditBatch(tuple(alike), 1))
    assert not report.failed and report.notes["collisions"] == 1
    assert all(torch.isfinite(w).all() for w in again.edited_weights().values())
    with pytest.raises(BadEditor, match="made with model another"):
        settled.load_state_dict({**again.state_dict(), "model": "another"})
    old = {k: v for k, v in again.state_dict().items() if k != "model"}
    settled.load_state_dict(old)  # of a version that did not say
