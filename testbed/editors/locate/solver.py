"""One ridge solve for every locate-then-edit method: `Delta = R K^T (A0 + H + K K^T)^-1`.

A0 is the prior precision (how much other keys count), H the Gram matrix of past keys. A prior is given as
a change of basis `g = M^-1 k` in which A0 is `rho I`; the solve is then n x n beside what is known of the
past: a growing Cholesky factor of the Gram matrix of past keys, or, when these near the width, the dense
f x f sum. No inverse is ever formed.

f is the width of the MLP, d of the model, n the edits of a batch, N all edits so far. Everything here is float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import cholesky_ex, solve_triangular

from testbed.editors.base import EditFailed

_SAME_DIRECTION = 1e-6
"""Singular value, as a share of the longest key, under which a key adds no direction."""


class Prior(ABC):
    """Prior precision A0 (f, f) as a basis in which it is `rho I`; directions outside the basis are never written to."""

    rho: float
    excluded: int = 0
    """Directions of the key space that no edit may use."""

    @abstractmethod
    def whiten(self, keys: Float[Tensor, "f n"]) -> Float[Tensor, "f n"]:
        """Keys (f, n) in the basis."""

    @abstractmethod
    def unwhiten(self, rows: Float[Tensor, "f n"]) -> Float[Tensor, "f n"]:
        """The transpose of `whiten`: factors (f, n) of a change, back in the model's own coordinates."""

    @abstractmethod
    def rewhiten(self, rows: Float[Tensor, "f n"]) -> Float[Tensor, "f n"]:
        """The inverse of `unwhiten`: factors (f, n) of a change in the basis, without what lies in excluded directions."""


@dataclass(frozen=True)
class IdentityPrior(Prior):
    """A0 = rho I: all keys count alike."""

    rho: float

    def whiten(self, keys: Tensor) -> Tensor:
        return keys

    def unwhiten(self, rows: Tensor) -> Tensor:
        return rows

    def rewhiten(self, rows: Tensor) -> Tensor:
        return rows


class SecondMomentPrior(Prior):
    """A0 = lam (C + eta m I), m the mean of C's diagonal: general keys count as often as they occur.

    C (f, f) is the second moment of keys in general text (not centred). eta keeps a C of deficient rank solvable.
    """

    def __init__(self, c: Tensor, lam: float, eta: float) -> None:
        self.rho = 1.0
        c = c.double()
        shift = eta * c.diagonal().mean()
        self._root = cholesky(lam * (c + shift * torch.eye(len(c), dtype=c.dtype, device=c.device)))

    def whiten(self, keys: Tensor) -> Tensor:
        return solve_triangular(self._root, keys, upper=False)

    def unwhiten(self, rows: Tensor) -> Tensor:
        return solve_triangular(self._root.T, rows, upper=True)

    def rewhiten(self, rows: Tensor) -> Tensor:
        return self._root.T @ rows


class NullSpacePrior(Prior):
    """A0 = rho I where C is small, infinite where it is large (AlphaEdit's projector).

    basis: (f, r) orthonormal excluded directions V, so that `P k = k - V V^T k` without a dense P.
    """

    def __init__(self, basis: Tensor, rho: float) -> None:
        self.rho, self.basis, self.excluded = rho, basis.double(), basis.shape[1]

    def whiten(self, keys: Tensor) -> Tensor:
        return keys - self.basis @ (self.basis.T @ keys)

    def unwhiten(self, rows: Tensor) -> Tensor:
        return self.whiten(rows)

    def rewhiten(self, rows: Tensor) -> Tensor:
        return self.whiten(rows)

    def without(self, keys: Float[Tensor, "n f"]) -> NullSpacePrior:
        """The same prior with what these keys (n, f) add to the excluded directions excluded too."""
        u, s, _ = torch.linalg.svd(self.whiten(keys.double().T), full_matrices=False)
        new = u[:, s > _SAME_DIRECTION * keys.double().norm(dim=1).max()]
        return NullSpacePrior(torch.cat([self.basis, new], dim=1), self.rho)


@dataclass(frozen=True)
class Solution:
    """A change `left^T right` of one weight, and what the solve says of itself.

    left: (n, d), right: (n, f) float64. written: mean share of the residual that the solve writes, in [0, 1).
    novelty: share of the keys' squared norm that past keys do not explain. condition: of the n x n system.
    """

    left: Float[Tensor, "n d"]
    right: Float[Tensor, "n f"]
    written: float
    novelty: float
    condition: float


class Ridge:
    """The solve of one layer, edit after edit.

    Args:
        prior: A0.
        history: past keys count as constraints (H = sum K K^T); without it every batch stands alone (H = 0).
    """

    def __init__(self, prior: Prior, history: bool) -> None:
        self.prior, self.history = prior, history
        self.past: Tensor | None = None  # (N, f) whitened past keys
        self.root: Tensor | None = None  # (N, N) lower Cholesky factor of their Gram matrix + rho I
        self.dense: Tensor | None = None  # (f, f) rho I + their sum, once they near the width

    def solve(self, keys: Float[Tensor, "n f"], residual: Float[Tensor, "n d"]) -> Solution:
        """The change for keys (n, f) and residuals (n, d). Raises `EditFailed` for numbers that are not finite."""
        if not (torch.isfinite(keys).all() and torch.isfinite(residual).all()):
            raise EditFailed("keys or residuals are not finite: the model's activations have blown up")
        g = self.prior.whiten(keys.double().T)
        part = self._part(g)
        share = torch.linalg.eigvalsh(_symmetric(g.T @ part)).clamp(0, 1 - 1e-15)
        novel = (self.prior.rho * share / (1 - share)).sum() / g.square().sum().clamp(min=1e-300)
        return Solution(
            residual.double(),
            self.prior.unwhiten(part).T.contiguous(),
            float(share.mean()),
            float(novel.clamp(max=1)),
            float((1 - share.min()) / (1 - share.max())),
        )

    def _part(self, g: Tensor) -> Tensor:
        """(f, n) `(rho I + G G^T + g g^T)^-1 g`, G the past."""
        if self.dense is not None:
            return torch.cholesky_solve(g, cholesky(self.dense + g @ g.T))
        gram = _symmetric(g.T @ g) + self.prior.rho * torch.eye(g.shape[1], dtype=g.dtype, device=g.device)
        if self.past is None or self.root is None:
            return torch.cholesky_solve(g.T, cholesky(gram)).T
        cross = solve_triangular(self.root, self.past @ g, upper=False)
        fresh = g - self.past.T @ solve_triangular(self.root.T, cross, upper=True)
        return torch.cholesky_solve(fresh.T, cholesky(gram - _symmetric(cross.T @ cross))).T

    def append(self, keys: Float[Tensor, "n f"]) -> None:
        """Count keys (n, f) as past; nothing without history."""
        if not self.history:
            return
        g = self.prior.whiten(keys.double().T)
        if self.dense is None and self._count() + g.shape[1] > g.shape[0] // 2:
            eye = torch.eye(g.shape[0], dtype=g.dtype, device=g.device)
            self.dense = self.prior.rho * eye + (self.past.T @ self.past if self.past is not None else 0)
            self.past = self.root = None
        if self.dense is not None:
            self.dense = self.dense + g @ g.T
        else:
            self._grow(g)

    def multiplied(self, rows: Float[Tensor, "d f"]) -> Float[Tensor, "d f"]:
        """Whitened rows (d, f) times `rho I + G G^T`, G the past."""
        if self.dense is not None:
            return rows @ self.dense
        return self.prior.rho * rows + ((rows @ self.past.T) @ self.past if self.past is not None else 0)

    def divided(self, rows: Float[Tensor, "d f"]) -> Float[Tensor, "d f"]:
        """Whitened rows (d, f) times the inverse of `rho I + G G^T`, G the past."""
        if self.dense is not None:
            return torch.cholesky_solve(rows.T, cholesky(self.dense)).T
        if self.past is None or self.root is None:
            return rows / self.prior.rho
        return (rows - torch.cholesky_solve((rows @ self.past.T).T, self.root).T @ self.past) / self.prior.rho

    def _count(self) -> int:
        return 0 if self.past is None else len(self.past)

    def _grow(self, g: Tensor) -> None:
        """Append a block row to the Cholesky factor."""
        n, old = g.shape[1], self._count()
        root = g.new_zeros(old + n, old + n)
        gram = _symmetric(g.T @ g) + self.prior.rho * torch.eye(n, dtype=g.dtype, device=g.device)
        if self.past is not None and self.root is not None:
            cross = solve_triangular(self.root, self.past @ g, upper=False)
            root[:old, :old], root[old:, :old] = self.root, cross.T
            gram = gram - _symmetric(cross.T @ cross)
        root[old:, old:] = cholesky(gram)
        self.past = g.T.contiguous() if self.past is None else torch.cat([self.past, g.T])
        self.root = root


class ShrinkingRidge(Ridge):
    """The solve of one layer in a null space that shrinks: what past keys use is excluded from then on (EvoEdit)."""

    def __init__(self, prior: NullSpacePrior) -> None:
        super().__init__(prior, history=False)
        self.space = prior

    def solve(self, keys: Tensor, residual: Tensor) -> Solution:
        if self.space.excluded >= keys.shape[1]:
            raise EditFailed(f"past edits use all {keys.shape[1]} directions of the keys, and none is left to write in")
        return super().solve(keys, residual)

    def append(self, keys: Tensor) -> None:
        self.prior = self.space = self.space.without(keys)


def _symmetric(m: Tensor) -> Tensor:
    return (m + m.T) / 2


def cholesky(m: Float[Tensor, "m m"]) -> Float[Tensor, "m m"]:
    """Lower factor of a symmetric matrix that rounding may have made slightly indefinite.

    A growing multiple of the unit matrix (from 1e-14 of the mean diagonal) is added until it factors.
    Raises `EditFailed` for a matrix that is not finite or not near positive semi-definite.
    """
    root, bad = cholesky_ex(m)
    scale = m.diagonal().abs().mean()
    eye = torch.eye(len(m), dtype=m.dtype, device=m.device)
    for power in range(-14, -5):
        if not bad:
            return root
        root, bad = cholesky_ex(m + 10.0**power * scale * eye)
    raise EditFailed("the solve has no positive definite system: the keys or their second moments are not finite")
