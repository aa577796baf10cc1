"""UltraEdit against plain computations: statistics, rows, the solve, undo, and its rules for what is undefined."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.core.events import EditBatch, EditEvent
from testbed.editors.base import BadEditor, EditFailed
from testbed.editors.locate.ultraedit import RunningStatistics, UltraEdit, UltraEditConfig, change
from testbed.model.encoding import answer_ids
from tests.helpers.models import build

FACTS = [EditEvent("add", 1.0 + i, i, f"The colour of {s} is", t, subject=s) for i, (s, t) in enumerate(zip("ABCDEF", ("red", "blue") * 3))]


def make(kind: str = "llama", **given: Any) -> UltraEdit:
    from streams.base import TrainPool
    from testbed.core.events import Question

    editor = UltraEdit(UltraEditConfig(**given))
    editor.prepare(build(kind), TrainPool(tuple(Question("general", f"What is {i}?", f"word {i}", topic="pool") for i in range(8))))
    return editor


def apply(editor: UltraEdit, events: list[EditEvent], step: int = 1) -> Any:
    return editor.apply(EditBatch(tuple(events), step))


def same(a: UltraEdit, b: UltraEdit, tolerance: float = 1e-6) -> None:
    for x, y in zip(a.edited_weights().values(), b.edited_weights().values(), strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 6), st.lists(st.integers(0, 40), max_size=6), st.integers(0, 2**31))
def test_statistics_are_those_of_all_rows_whatever_the_parts(n: int, width: int, cuts: list[int], seed: int) -> None:
    rows = np.random.default_rng(seed).normal(3.0, 5.0, (n, width))
    statistics, edges = RunningStatistics(), sorted({0, n, *(c for c in cuts if c < n)})
    for first, stop in itertools.pairwise(edges):
        statistics = statistics.with_rows(torch.from_numpy(rows[first:stop]))
    expected = (rows - rows.mean(0)) / rows.std(0, ddof=1)
    np.testing.assert_allclose(statistics.normalised(torch.from_numpy(rows)).numpy(), expected, rtol=1e-9, atol=1e-9)


def test_the_solve_in_the_rows_is_the_solve_in_the_inputs_and_stays_in_their_span() -> None:
    rng = torch.Generator().manual_seed(0)
    h, v = torch.randn(5, 12, generator=rng, dtype=torch.float64), torch.randn(5, 7, generator=rng, dtype=torch.float64)
    for ridge in (0.5, 10.0):
        primal = torch.linalg.solve(h.T @ h + ridge * torch.eye(12, dtype=torch.float64), h.T @ v).T
        torch.testing.assert_close(change(h, v, ridge), primal, atol=1e-12, rtol=1e-12)
    outside = torch.linalg.svd(h)[2][5:]
    assert float((change(h, v, 1.0) @ outside.T).abs().max()) < 1e-12
    shuffled = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(change(h[shuffled], v[shuffled], 1.0), change(h, v, 1.0), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(change(h, 2 * v, 1.0), 2 * change(h, v, 1.0), atol=1e-12, rtol=1e-12)
    assert not change(h, 0 * v, 1.0).any()


def test_rows_are_the_answers_tokens_with_the_gradients_of_the_whole_model() -> None:
    editor, handle = make(), build("llama")
    apply(editor, FACTS[:2])
    (h,), (g,) = editor.rows.h, editor.rows.g
    ids = [answer_ids(handle, e.ask(), e.target) for e in FACTS[:2]]
    assert [editor.rows.owner.count(e.id) for e in FACTS[:2]] == [len(i) + 1 for i in ids]  # the end token too
    at = 0
    for event, answer in zip(FACTS[:2], ids):
        prompt = handle.tokenizer(event.prompt)["input_ids"]
        tokens = torch.tensor([[*prompt, *answer, handle.tokenizer.eos_token_id]])
        kept: list[torch.Tensor] = []
        module = editor.targets[0].module

        def watch(m: Any, args: Any, out: torch.Tensor, kept: list[torch.Tensor] = kept) -> torch.Tensor:
            kept.extend([args[0], torch.zeros_like(out, requires_grad=True)])
            return out + kept[-1]

        with handle.hooked(module, watch):
            logits = handle.model(tokens).logits[0]
        n = len(answer) + 1
        loss = torch.nn.functional.cross_entropy(logits[-n - 1 : -1], tokens[0, -n:], reduction="sum")
        (gradient,) = torch.autograd.grad(loss, kept[1])
        torch.testing.assert_close(h[at : at + n], kept[0][0, -n - 1 : -1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(g[at : at + n], gradient[0, -n - 1 : -1], atol=1e-6, rtol=1e-3)
        at += n


def test_the_weights_follow_from_the_equations() -> None:
    editor = make()
    for step, part in enumerate((FACTS[:2], FACTS[2:4]), 1):
        apply(editor, list(part), step)
    (h,), (g,), total = editor.rows.h, editor.rows.g, 0.0
    at = 0
    for n in editor.sizes:
        seen_h, seen_g = (t[: at + n].double().numpy() for t in (h, g))
        hat_h, hat_g = ((x[at:] - x.mean(0)) / x.std(0, ddof=1) for x in (seen_h, seen_g))
        v = -editor.hyper.lr * (hat_h**2).sum(1, keepdims=True) * hat_g
        own = seen_h[at:]
        total = total + np.linalg.solve(own.T @ own + np.eye(own.shape[1]), own.T @ v).T
        at += n
    (weight,) = editor.edited_weights().values()
    np.testing.assert_allclose((weight - editor.bases[0]).numpy(), total, atol=1e-6)


def test_undo_leaves_what_the_other_rows_give() -> None:
    both, first = make(), make()
    apply(both, FACTS[:2])
    apply(first, FACTS[:2])
    apply(both, FACTS[2:4], 2)
    both.revert([e.id for e in FACTS[2:4]])
    same(both, first)
    apply(both, FACTS[4:6], 2)
    both.revert([FACTS[4].id])
    assert set(both.rows.owner) == {e.id for e in (*FACTS[:2], FACTS[5])}
    with pytest.raises(BadEditor, match="made no edit"):
        both.revert([FACTS[4].id])


def test_a_single_token_and_identical_edits_have_their_rules() -> None:
    with pytest.raises(EditFailed, match="a single answer token"):
        RunningStatistics().with_rows(torch.ones(1, 3)).normalised(torch.ones(1, 3))
    assert not RunningStatistics().with_rows(torch.ones(4, 3)).normalised(torch.ones(4, 3)).any()
    editor, alone = make(), make()
    again = [EditEvent("add", 1.0, i, FACTS[0].prompt, FACTS[0].target, subject="A", source=str(i)) for i in range(3)]
    assert not apply(editor, again).failed and not apply(alone, again[:1]).failed
    assert all(torch.isfinite(w).all() for w in editor.edited_weights().values())


def test_fields_change_what_they_say() -> None:
    lifelong, anew, warm, stable = make(), make(lifelong=False), make(preheat=8), make(ridge=10.0)
    for editor in (lifelong, anew, warm, stable):
        apply(editor, FACTS[:2])
    same(lifelong, anew)
    (a,), (b,), (c,) = (list(e.edited_weights().values()) for e in (lifelong, warm, stable))
    assert not torch.allclose(a, b) and float((c - stable.bases[0]).norm()) < float((a - lifelong.bases[0]).norm())
    for editor in (lifelong, anew):
        apply(editor, FACTS[2:4], 2)
    (a,), (b,) = (list(e.edited_weights().values()) for e in (lifelong, anew))
    assert not torch.allclose(a, b)


def test_statistics_of_another_model_are_refused() -> None:
    editor = make()
    apply(editor, FACTS[:2])
    with pytest.raises(BadEditor, match="the state was made with model"):
        make().load_state_dict({**editor.state_dict(), "model": "another"})
