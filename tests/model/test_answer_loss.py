"""The loss under a wide head, in blocks, against the softmax over all tokens at once in float64."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from testbed.model import answer_loss as module
from testbed.model.answer_loss import TOKENS, answer_loss, answer_nll, in_blocks
from testbed.model.families import LogitForm
from testbed.model.handle import ModelHandle


class Headed(SimpleNamespace):
    """A handle with nothing but a head and what follows it."""

    device, logit_form = torch.device("cpu"), LogitForm()
    logits = ModelHandle.logits


def head_of(tokens: int, bias: bool, seed: int, width: int = 6) -> tuple[Any, torch.Generator]:
    """A handle with nothing but a head, frozen, and the generator that made it."""
    rng = torch.Generator().manual_seed(seed)
    head = nn.Linear(width, tokens, bias=bias)
    for p in head.parameters():
        p.data = torch.randn(p.shape, generator=rng)
    return Headed(head=head.requires_grad_(False)), rng


def by_softmax(handle: Any, hidden: Tensor, targets: Tensor, pull: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, gradient of their sum weighted with `pull`, and the likeliest tokens, in float64."""
    h = hidden.detach().double().requires_grad_(True)
    bias = None if handle.head.bias is None else handle.head.bias.double()
    logits = nn.functional.linear(h, handle.head.weight.double(), bias)
    loss = -logits.log_softmax(1)[torch.arange(len(h)), targets]
    (loss * pull.double()).sum().backward()
    assert h.grad is not None
    return loss.detach(), h.grad, logits.argmax(1)


@settings(deadline=None)
@given(
    n=st.integers(1, 9),
    tokens=st.integers(11, 40),
    block=st.integers(1, 5),
    rows=st.integers(1, 9),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_blocks_of_any_size_give_the_softmax_over_all(n: int, tokens: int, block: int, rows: int, bias: bool, seed: int) -> None:
    handle, rng = head_of(tokens, bias, seed)
    hidden = torch.randn(n, 6, generator=rng).requires_grad_(True)
    targets, pull = torch.randint(tokens, (n,), generator=rng), torch.randn(n, generator=rng)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TOKENS", block)
        patch.setattr(module, "ROWS", rows)
        assert in_blocks(handle.head)
        loss, likeliest = answer_loss(handle, hidden, targets)
        (loss * pull).sum().backward()
        with torch.no_grad():
            alone, _ = answer_loss(handle, hidden, targets)
    want, grad, best = by_softmax(handle, hidden, targets, pull)
    torch.testing.assert_close(loss.detach().double(), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(alone, loss.detach())
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad.double(), grad, rtol=1e-4, atol=1e-5)
    assert likeliest.tolist() == (best == targets).tolist()


def test_a_wide_head_is_taken_in_blocks_and_whole_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, rng = head_of(2 * TOKENS + 1, bias=False, seed=0)
    assert not in_blocks(head_of(2 * TOKENS, bias=False, seed=0)[0].head)
    hidden, targets = torch.randn(3, 6, generator=rng), torch.tensor([0, TOKENS, 2 * TOKENS])
    fast, _ = answer_loss(handle, hidden, targets)
    monkeypatch.setattr(module, "_rows", None)
    with patch.object(module, "in_blocks", lambda head: False):
        torch.testing.assert_close(fast, answer_loss(handle, hidden, targets)[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError):
        answer_loss(handle, hidden, targets)


def test_a_head_that_is_more_than_a_matrix_is_called_as_it_is() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    handle, rng = head_of(3 * TOKENS, bias=False, seed=1)
    other = Headed(head=Doubled(6, 3 * TOKENS, bias=False))
    other.head.weight = handle.head.weight
    hidden, targets = torch.randn(4, 6, generator=rng), torch.arange(4)
    want = nn.functional.cross_entropy(2 * hidden @ handle.head.weight.T, targets, reduction="none")
    torch.testing.assert_close(answer_loss(other, hidden, targets)[0], want)


@pytest.mark.parametrize("form", [LogitForm(0.25), LogitForm(3.0, 2.0), LogitForm(cap=0.5)])
@pytest.mark.parametrize(("tokens", "bias"), [(40, True), (2 * TOKENS + 1, False), (2 * TOKENS + 1, True)])
def test_what_a_model_does_to_its_logits_behind_the_head_counts(form: LogitForm, tokens: int, bias: bool) -> None:
    handle, rng = head_of(tokens, bias, seed=3)
    handle.logit_form = form
    hidden, targets = torch.randn(4, 6, generator=rng).requires_grad_(True), torch.arange(4)
    logits = form.factor * handle.head(hidden)
    logits = logits if form.cap is None else form.cap * torch.tanh(logits / form.cap)
    want = nn.functional.cross_entropy(logits, targets, reduction="none")
    (grad,) = torch.autograd.grad(want.sum(), hidden)
    for loss in (answer_loss(handle, hidden, targets)[0], answer_nll(handle, hidden, targets)):
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), hidden)[0], grad, rtol=1e-4, atol=1e-5)


def test_blocks_are_of_few_bytes_on_a_cpu_and_of_the_whole_vocabulary_elsewhere() -> None:
    for width, rows in ((8, TOKENS), (1024, 2048), (2**20, 256)):
        parts = module._split(torch.empty(1, dtype=torch.float32).expand(3 * TOKENS, width), None)
        assert [len(w) for w, _ in parts] == [rows] * (3 * TOKENS // rows)
    assert len(module._split(torch.empty(3 * TOKENS, 1024, device="meta"), None)) == 1


def test_half_precision_keeps_losses_in_float32() -> None:
    handle, rng = head_of(3 * TOKENS, bias=True, seed=2)
    hidden, targets = torch.randn(5, 6, generator=rng).requires_grad_(True), torch.arange(5)
    want, grad, _ = by_softmax(handle, hidden, targets, torch.ones(5))
    handle.head.to(torch.bfloat16)
    half = hidden.detach().to(torch.bfloat16).requires_grad_(True)
    loss, _ = answer_loss(handle, half, targets)
    loss.sum().backward()
    assert loss.dtype == torch.float32 and half.grad is not None and half.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.detach().double(), want, rtol=2e-2, atol=2e-2)
    assert (half.grad.double() - grad).norm() < 0.02 * grad.norm()
