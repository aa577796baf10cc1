"""MALMEN's change of a weight in float64, from the paper's formulas: one position at a time, and a least-squares solve of the whole."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def pseudo_row(net: Mapping[str, np.ndarray], i: int, shape: str, row: np.ndarray, blocks: int) -> np.ndarray:
    """(f + d,) equation 1 for one position's [u; delta]."""
    z = (row - net[f"mean.{i}"]) / net[f"dev.{i}"]
    for k in range(blocks):
        v, u, b = (net[f"{x}.{shape}.{k}"] for x in "VUb")
        inner = u @ (v @ z) + b
        s, o = net[f"s.{i}.{k}"], net[f"o.{i}.{k}"]
        z = np.array([z[n] + s[n] * max(0.0, inner[n]) + o[n] for n in range(len(z))])
    return z


def change(net: Mapping[str, np.ndarray], i: int, shape: str, keys: np.ndarray, deltas: np.ndarray, blocks: int) -> np.ndarray:
    """(d, f) equations 1 to 3 for keys (n, f) and gradients (n, d)."""
    values = []
    for u, delta in zip(keys, deltas):
        z = pseudo_row(net, i, shape, np.concatenate([u, delta]), blocks)
        values.append(-net[f"alpha.{i}"] * float(u @ z[: len(u)]) * z[len(u) :])
    return ridge(keys, np.array(values), float(np.exp(net[f"lambda.{i}"])))


def ridge(keys: np.ndarray, values: np.ndarray, amount: float) -> np.ndarray:
    """(d, f) the X that makes |K X^T - V|^2 + amount |X|^2 least, as an ordinary least-squares problem with f rows more."""
    f = keys.shape[1]
    stacked = np.concatenate([keys, amount**0.5 * np.eye(f)])
    wanted = np.concatenate([values, np.zeros((f, values.shape[1]))])
    return np.linalg.lstsq(stacked, wanted, rcond=None)[0].T


def trajectory_weights(steps: int, depth: int, discount: float) -> np.ndarray:
    """(steps, steps) how much step t counts the edits of batch j, by the sum of the loss written out."""
    weights = np.zeros((steps, steps))
    for t in range(steps):
        for k in range(depth):
            if t - k >= 0:
                weights[t, t - k] += discount**k
    return weights
