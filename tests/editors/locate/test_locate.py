"""The solver against direct float64 solves; targets, keys, lookup positions and statistics on random tiny models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from testbed.editors.base import EditFailed
from testbed.editors.locate.solver import IdentityPrior, NullSpacePrior, Ridge, SecondMomentPrior, cholesky

F, D = 24, 7
seeds = st.integers(0, 2**16)
near = {"rtol": 1e-7, "atol": 1e-9}


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def spd(g: torch.Generator, n: int = F, condition: float = 1e4) -> Tensor:
    """A random second moment of a given condition."""
    q, _ = torch.linalg.qr(normal(g, n, n))
    return q @ torch.diag(torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)) @ q.T


def delta(ridge: Ridge, keys: Tensor, residual: Tensor) -> Tensor:
    """(d, f) change of one solve."""
    s = ridge.solve(keys, residual)
    return s.left.T @ s.right


def direct(a0: Tensor, past: Tensor, keys: Tensor, residual: Tensor) -> Tensor:
    """`R K^T (A0 + H + K K^T)^-1` by a plain dense solve; keys (n, f), residual (n, d)."""
    return torch.linalg.solve(a0 + past.T @ past + keys.T @ keys, keys.T @ residual).T


def basis(g: torch.Generator, r: int) -> Tensor:
    return torch.linalg.qr(normal(g, F, r))[0]


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 40), st.sampled_from([0.01, 1.0, 100.0]))
def test_moment_prior_equals_the_direct_solve(seed: int, n: int, lam: float) -> None:
    g = gen(seed)
    c, keys, residual = spd(g), normal(g, n, F), normal(g, n, D)
    got = delta(Ridge(SecondMomentPrior(c, lam, 0.0), False), keys, residual)
    torch.testing.assert_close(got, direct(lam * c, torch.zeros(1, F, dtype=torch.float64), keys, residual), **near)


@settings(max_examples=25, deadline=None)
@given(seeds, st.integers(1, 9), st.integers(0, 20))
def test_alphaedit_solve_equals_the_papers_form_and_the_codes(seed: int, n: int, r: int) -> None:
    g = gen(seed)
    v, past, keys, residual, l2 = basis(g, r), normal(g, 15, F), normal(g, n, F), normal(g, n, D), 3.0
    p, eye = torch.eye(F, dtype=torch.float64) - v @ v.T, torch.eye(F, dtype=torch.float64)
    ridge = Ridge(NullSpacePrior(v, l2), True)
    ridge.append(past[:7])
    ridge.append(past[7:])
    got = delta(ridge, keys, residual)
    k, h = keys.T, past.T @ past
    paper = residual.T @ k.T @ p @ torch.linalg.inv(h @ p + k @ k.T @ p + l2 * eye)
    code = torch.linalg.solve(p @ (k @ k.T + h) + l2 * eye, p @ k @ residual).T
    torch.testing.assert_close(paper, code, **near)
    torch.testing.assert_close(got, paper, **near)


@settings(max_examples=15, deadline=None)
@given(seeds, st.sampled_from([1, 3, 7]))
def test_growing_factor_and_dense_sum_are_one_solve(seed: int, size: int) -> None:
    g = gen(seed)
    c, history = spd(g), normal(g, 60, F)
    ridge = Ridge(SecondMomentPrior(c, 2.0, 0.0), True)
    for at in range(0, 60, size):
        keys, residual = history[at : at + size], normal(g, len(history[at : at + size]), D)
        torch.testing.assert_close(delta(ridge, keys, residual), direct(2.0 * c, history[:at], keys, residual), **near)
        ridge.append(keys)
    assert ridge.dense is not None
    assert ridge.past is None


@pytest.mark.parametrize("prior", ["moment", "null", "identity"])
def test_a_stream_in_batches_of_1_10_and_100_gives_the_same_weights(prior: str) -> None:
    g = gen(5)
    c, keys, values, w0 = spd(g), normal(g, 100, F), normal(g, 100, D), normal(g, D, F)
    made = {"moment": SecondMomentPrior(c, 0.5, 0.0), "null": NullSpacePrior(basis(g, 4), 0.3), "identity": IdentityPrior(0.3)}[prior]

    def run(size: int, order: Tensor) -> Tensor:
        ridge, w = Ridge(made, True), w0
        for part in order.split(size):
            w = w + delta(ridge, keys[part], values[part] - keys[part] @ w.T)
            ridge.append(keys[part])
        return w

    one = run(1, torch.arange(100))
    for size in (10, 100):
        torch.testing.assert_close(run(size, torch.arange(100)), one, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(run(10, torch.randperm(100, generator=g)), one, rtol=1e-7, atol=1e-8)


def test_without_history_the_batch_size_matters() -> None:
    g = gen(6)
    keys, values, ridge = normal(g, 20, F), normal(g, 20, D), Ridge(IdentityPrior(0.3), False)
    halves = delta(ridge, keys[:10], values[:10])
    ridge.append(keys[:10])
    halves = halves + delta(ridge, keys[10:], values[10:] - keys[10:] @ halves.T)
    assert (halves - delta(ridge, keys, values)).norm() > 0.1


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_excluded_directions_are_never_written_to(seed: int) -> None:
    g = gen(seed)
    v = basis(g, 6)
    change = delta(Ridge(NullSpacePrior(v, 1e-3), False), normal(g, 5, F), normal(g, 5, D))
    assert (change @ v).norm() <= 1e-12 * change.norm()


def test_leak_into_general_text_is_bounded_by_the_threshold() -> None:
    from testbed.editors.locate.alphaedit import excluded_directions

    g = gen(2)
    c = spd(g)
    v = excluded_directions(c, 1e-2)
    assert 0 < v.shape[1] < F
    change = delta(Ridge(NullSpacePrior(v, 0.1), False), normal(g, 5, F), normal(g, 5, D))
    assert (change @ c @ change.T).trace() <= 1e-2 * change.square().sum() * (1 + 1e-9)


def test_projector_is_idempotent_symmetric_and_of_its_rank() -> None:
    g = gen(3)
    v = basis(g, 5)
    prior, eye = NullSpacePrior(v, 1.0), torch.eye(F, dtype=torch.float64)
    p = prior.whiten(eye)
    torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-12)
    torch.testing.assert_close(p, p.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(p, eye - v @ v.T, rtol=0, atol=1e-12)
    assert float(p.trace()) == pytest.approx(F - 5)


@settings(max_examples=15, deadline=None)
@given(seeds)
def test_order_within_a_batch_does_not_matter(seed: int) -> None:
    g = gen(seed)
    keys, residual, order = normal(g, 6, F), normal(g, 6, D), torch.randperm(6, generator=g)
    ridge = Ridge(SecondMomentPrior(spd(g), 1.0, 0.0), False)
    torch.testing.assert_close(delta(ridge, keys, residual), delta(ridge, keys[order], residual[order]), **near)


def test_one_edit_of_memit_is_rome_shrunk() -> None:
    g = gen(7)
    c, key, residual, lam = spd(g), normal(g, 1, F), normal(g, 1, D), 3.0
    got = delta(Ridge(SecondMomentPrior(c, lam, 0.0), False), key, residual)
    u = torch.linalg.solve(c, key[0])
    s = float(key[0] @ u)
    rome = torch.outer(residual[0], u) / s
    torch.testing.assert_close(got, rome * s / (lam + s), **near)
    assert torch.linalg.matrix_rank(got) == 1


def test_emmets_form_is_memits() -> None:
    g = gen(8)
    c, keys, residual, lam = spd(g), normal(g, 5, F), normal(g, 5, D), 0.7
    ck = torch.linalg.solve(c, keys.T)
    emmet = (residual.T @ torch.linalg.inv(keys @ ck + lam * torch.eye(5, dtype=torch.float64))) @ ck.T
    torch.testing.assert_close(delta(Ridge(SecondMomentPrior(c, lam, 0.0), False), keys, residual), emmet, **near)


def test_error_falls_in_proportion_to_lambda() -> None:
    g = gen(9)
    c, keys, residual = spd(g, condition=10.0), normal(g, 5, F), normal(g, 5, D)
    errors = [
        float((keys @ delta(Ridge(prior, False), keys, residual).T - residual).norm())
        for prior in (SecondMomentPrior(c, lam, 0.0) for lam in (1e-2, 1e-3, 1e-4))
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.02)


def test_scaling_and_rotation_of_keys() -> None:
    g = gen(10)
    keys, residual, c = normal(g, 4, F), normal(g, 4, D), spd(g)
    plain = delta(Ridge(IdentityPrior(2.0), False), keys, residual)
    torch.testing.assert_close(delta(Ridge(IdentityPrior(2.0 * 9), False), 3 * keys, residual), plain / 3, **near)
    torch.testing.assert_close(delta(Ridge(IdentityPrior(2.0), False), keys, 5 * residual), 5 * plain, **near)
    q = torch.linalg.qr(normal(g, F, F))[0]
    turned = delta(Ridge(SecondMomentPrior(q @ c @ q.T, 1.0, 0.0), False), keys @ q.T, residual)
    torch.testing.assert_close(turned, delta(Ridge(SecondMomentPrior(c, 1.0, 0.0), False), keys, residual) @ q.T, **near)


def test_null_space_without_exclusions_is_memit_with_unit_moment() -> None:
    g = gen(11)
    past, keys, residual, eye = normal(g, 6, F), normal(g, 4, F), normal(g, 4, D), torch.eye(F, dtype=torch.float64)
    ridges = [Ridge(NullSpacePrior(torch.zeros(F, 0), 2.0), True), Ridge(SecondMomentPrior(eye, 2.0, 0.0), True)]
    for r in ridges:
        r.append(past)
    torch.testing.assert_close(delta(ridges[0], keys, residual), delta(ridges[1], keys, residual), **near)


def test_repeated_keys_with_different_residuals_get_their_mean() -> None:
    g = gen(12)
    key, a, b = normal(g, 1, F), normal(g, 1, D), normal(g, 1, D)
    change = delta(Ridge(IdentityPrior(1e-9), False), torch.cat([key, key]), torch.cat([a, b]))
    torch.testing.assert_close(key @ change.T, (a + b) / 2, rtol=1e-5, atol=1e-6)


def test_a_repeated_edit_without_residual_changes_nothing() -> None:
    g = gen(13)
    keys, ridge = normal(g, 3, F), Ridge(IdentityPrior(0.5), True)
    ridge.append(keys)
    assert delta(ridge, keys, torch.zeros(3, D, dtype=torch.float64)).abs().max() == 0


def test_a_known_key_has_no_novelty_and_gives_no_nan() -> None:
    g = gen(14)
    keys, ridge = normal(g, 3, F), Ridge(IdentityPrior(1e-12), True)
    first = ridge.solve(keys, normal(g, 3, D))
    ridge.append(keys)
    again = ridge.solve(keys, normal(g, 3, D))
    assert first.novelty > 0.99
    assert again.novelty < 1e-6
    assert torch.isfinite(again.right).all()


@settings(max_examples=15, deadline=None)
@given(seeds, st.booleans())
def test_share_written_lies_between_0_and_1_and_later_edits_hardly_move_earlier_ones(seed: int, dense: bool) -> None:
    g = gen(seed)
    past, keys, residual, ridge = normal(g, 16 if dense else 5, F), normal(g, 4, F), normal(g, 4, D), Ridge(IdentityPrior(1e-4), True)
    ridge.append(past)
    s = ridge.solve(keys, residual)
    assert (ridge.dense is not None) == dense
    assert 0 <= s.written < 1
    assert s.condition >= 1
    assert (past @ (s.left.T @ s.right).T).norm() < 0.05 * residual.norm()


def test_deficient_and_broken_statistics() -> None:
    g = gen(15)
    low = normal(g, 3, F)
    change = delta(Ridge(SecondMomentPrior(low.T @ low, 1.0, 1e-4), False), normal(g, 2, F), normal(g, 2, D))
    assert torch.isfinite(change).all()
    with pytest.raises(EditFailed, match="positive definite"):
        cholesky(-torch.eye(3, dtype=torch.float64))
    with pytest.raises(EditFailed, match="not finite"):
        Ridge(IdentityPrior(1.0), False).solve(torch.full((1, F), float("nan")), torch.zeros(1, D))


def test_the_shares_of_the_layers_write_the_whole_residual_when_each_writes_its_own() -> None:
    """With a part `written` of every layer's share, `prod(1 - written share)` is left: 0.9 of five layers leave 0.025."""
    from testbed.editors.locate.memit import Memit
    from testbed.editors.locate.pmet import Pmet

    def left(cls: type, written: float) -> float:
        editor, out = cls.__new__(cls), 1.0
        for to_go in (5, 4, 3, 2, 1):
            out *= 1 - written * editor._share(to_go)
        return out

    assert left(Memit, 1.0) == 0.0
    assert left(Memit, 0.9) == pytest.approx(0.025, abs=0.002)
    assert Pmet.__new__(Pmet)._share(4) == 0.5


def test_what_reaches_general_text_falls_with_lambda() -> None:
    g = gen(16)
    c, keys, residual = spd(g), normal(g, 5, F), normal(g, 5, D)
    moved = []
    for lam in (1e-3, 1e-2, 1e-1, 1.0, 10.0):
        change = delta(Ridge(SecondMomentPrior(c, lam, 0.0), False), keys, residual)
        moved.append(float((change @ c @ change.T).trace()))
    assert moved == sorted(moved, reverse=True)


def test_without_lambda_every_residual_is_met() -> None:
    """EMMET's equality constraint, and ROME's for a single key."""
    g = gen(17)
    c, keys, residual = spd(g), normal(g, 6, F), normal(g, 6, D)
    change = delta(Ridge(SecondMomentPrior(c, 1e-13, 0.0), False), keys, residual)
    torch.testing.assert_close(keys @ change.T, residual, rtol=1e-6, atol=1e-6)


def test_a_stream_is_one_ridge_regression_over_all_its_edits() -> None:
    g = gen(18)
    c, keys, values, w0 = spd(g), normal(g, 30, F), normal(g, 30, D), normal(g, D, F)
    ridge, w = Ridge(SecondMomentPrior(c, 0.7, 0.0), True), w0
    for part in torch.arange(30).split(4):
        w = w + delta(ridge, keys[part], values[part] - keys[part] @ w.T)
        ridge.append(keys[part])
    # argmin |D K - (V - W0 K)|^2 + <D A0, D>, by its gradient: it is 0 at the minimum
    change = w - w0
    gradient = (change @ keys.T - (values - keys @ w0.T).T) @ keys + change @ (0.7 * c)
    assert gradient.norm() < 1e-8 * (keys.norm() * values.norm())


def test_float32_keys_give_the_change_to_single_precision() -> None:
    g = gen(19)
    c, keys, residual = spd(g, condition=1e5), normal(g, 8, F), normal(g, 8, D)
    ridge = Ridge(SecondMomentPrior(c, 1.0, 0.0), False)
    single = delta(ridge, keys.float(), residual.float())
    assert single.dtype == torch.float64
    assert float((single - delta(ridge, keys, residual)).norm() / single.norm()) < 1e-3
