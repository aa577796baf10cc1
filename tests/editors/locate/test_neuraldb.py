"""NeuralDB: the lookup against a plain one, exact undo and revision, and that an entry depends on no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.core.events import Ask, EditBatch, EditEvent
from testbed.editors.base import BadEditor
from testbed.editors.codebook.nearest import Keys, Nearest
from testbed.editors.locate.neuraldb import NeuralDB, StoreRow, TokenGate
from testbed.editors.locate.solver import IdentityPrior, Ridge
from testbed.model.encoding import collate
from testbed.model.predictor import ModelPredictor
from tests.helpers.facts import FACTS, make
from tests.helpers.models import build


def edited(*parts: list[EditEvent], kind: str = "llama", **given: Any) -> NeuralDB:
    editor: Any = make("neuraldb", kind, **given)
    for step, events in enumerate(parts, 1):
        assert not editor.apply(EditBatch(tuple(events), step)).failed
    return editor


def output(editor: NeuralDB, prompt: str) -> torch.Tensor:
    """(1, T, d) what the module puts out under the store."""
    kept: list[torch.Tensor] = []
    predictor: Any = editor.predictor()
    batch = collate(editor.handle, [Ask(prompt)])
    with torch.no_grad(), predictor.around(batch), editor.handle.hooked(editor.module, lambda m, a, out: kept.append(out.clone())):
        editor.handle.model(**batch.inputs, use_cache=False)
    return kept[0]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8), st.integers(1, 9), st.floats(-1, 1))
def test_every_token_gets_the_residual_of_its_nearest_key_by_cosine(seed: int, entries: int, tokens: int, gamma: float) -> None:
    g = torch.Generator().manual_seed(seed)
    keys, residuals = torch.randn(entries, 6, generator=g), torch.randn(entries, 5, generator=g)
    x, base = torch.randn(1, tokens, 6, generator=g), torch.randn(1, tokens, 5, generator=g)
    radii = torch.full((entries,), 1 - gamma, dtype=torch.float64)
    gate = TokenGate(
        None, None, Nearest(Keys(keys, "cosine"), radii, newest=True), residuals, [StoreRow(str(i), "") for i in range(entries)]
    )  # type: ignore[arg-type]
    handle = build("llama")
    batch = collate(handle, [Ask("a b c")])
    got = gate._call(x, base, batch)
    cosine = torch.nn.functional.cosine_similarity(x[0][:, None].double(), keys[None].double(), dim=-1)
    best = cosine.max(1)
    if (best.values - gamma).abs().min() < 1e-6:
        return  # on the threshold
    want = base.clone()
    want[0] += torch.where(best.values[:, None] > gamma, residuals[best.indices], 0.0)
    torch.testing.assert_close(base if got is None else got, want)
    assert (got is None) == bool((best.values <= gamma).all())


def test_a_miss_is_the_base_bit_for_bit_and_gamma_minus_one_always_hits() -> None:
    never, always = edited([FACTS[0]], gamma=1.0), edited([FACTS[0]], gamma=-1.0)
    base = ModelPredictor(build("llama"), around=lambda batch: build("llama").swapped({}))
    asks = [Ask("two yellow stars"), Ask("a red circle")]
    for a, b in zip(never.predictor().score(asks, ["red", "green"]), base.score(asks, ["red", "green"])):
        assert (a.logprobs == b.logprobs).all()
    plain = output(edited(), "a red circle")
    torch.testing.assert_close(output(always, "a red circle") - plain, always.residuals.expand_as(plain), atol=1e-5, rtol=1e-5)


def test_the_edits_own_prompt_gives_the_target_output_where_the_subject_ends() -> None:
    """W k + r = v*, and with orthogonal keys a ridge of nothing writes the same."""
    editor = edited(FACTS[:2], contexts=0)
    keys, _ = torch.linalg.qr(torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    residuals = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solution = Ridge(IdentityPrior(1e-12), history=False).solve(keys.T, residuals)
    written = keys.T @ (solution.left.T @ solution.right).T
    torch.testing.assert_close(written, residuals, atol=1e-9, rtol=1e-9)
    row, distance = Nearest(Keys(editor.keys, "cosine"), torch.full((2,), 0.35, dtype=torch.float64))(editor.keys)
    assert row.tolist() == [0, 1] and distance.max() < 1e-12
    asks, targets = [e.ask() for e in FACTS[:2]], [e.target for e in FACTS[:2]]
    after, before = editor.predictor().score(asks, targets), edited().predictor().score(asks, targets)
    gain = [float(a.logprobs.mean() - b.logprobs.mean()) for a, b in zip(after, before)]
    assert min(gain) > 0.1, gain


def test_entries_do_not_depend_on_each_other_and_undo_is_exact() -> None:
    all_at_once, in_turn, alone = edited(FACTS), edited(*[[e] for e in FACTS]), edited([FACTS[1]])
    torch.testing.assert_close(all_at_once.residuals, in_turn.residuals, atol=1e-4, rtol=1e-3)
    assert torch.equal(in_turn.keys[1], alone.keys[0]) and torch.equal(in_turn.residuals[1], alone.residuals[0])
    in_turn.revert([FACTS[0].id, FACTS[2].id])
    assert torch.equal(output(in_turn, FACTS[1].prompt), output(alone, FACTS[1].prompt))
    with pytest.raises(BadEditor, match="made no edit"):
        in_turn.revert([FACTS[0].id])
    in_turn.revert([FACTS[1].id])
    assert torch.equal(output(in_turn, FACTS[1].prompt), output(edited(), FACTS[1].prompt))


def test_a_fact_that_changes_again_takes_the_old_entrys_place_until_it_is_undone() -> None:
    again = replace(FACTS[0], target="red", kind="revise", revises=FACTS[0].id, id="")
    first, both, new = edited([FACTS[0]]), edited([FACTS[0]], [again]), edited([again])
    assert len(both.entries) == 2 and both._live() == [1]
    assert torch.equal(output(both, again.prompt), output(new, again.prompt))
    both.revert([again.id])
    assert torch.equal(output(both, again.prompt), output(first, again.prompt))


def test_identical_edits_a_zero_residual_and_another_models_state() -> None:
    same = [replace(FACTS[0], seq=i, source=str(i), id="") for i in range(3)]
    editor = edited(same)
    assert editor._live() == [2] and torch.isfinite(editor.residuals).all()
    known = edited([FACTS[0]], steps=1)  # one evaluation of the loss and no step of the optimiser
    assert not known.residuals.any()
    torch.testing.assert_close(output(known, FACTS[0].prompt), output(edited(), FACTS[0].prompt), atol=0, rtol=0)
    with pytest.raises(BadEditor, match="the state was made with model"):
        edited().load_state_dict({**editor.state_dict(), "model": "another"})
    with pytest.raises(BadEditor, match="the highest layer is 1"):
        make("neuraldb", layer=2)


def test_a_predictor_keeps_the_store_as_it_was() -> None:
    editor = edited([FACTS[0]])
    before = editor.predictor()
    first = before.score([e.ask() for e in FACTS], [e.target for e in FACTS])
    editor.apply(EditBatch(tuple(FACTS[1:]), 2))
    again = before.score([e.ask() for e in FACTS], [e.target for e in FACTS])
    assert all((a.logprobs == b.logprobs).all() for a, b in zip(first, again))
