"""MEND's update in float64 and loops, from the paper's formulas: whole-model gradients, one position and one entry at a time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from testbed.core.events import Ask
from testbed.model.encoding import answer_ids, collate
from testbed.model.handle import ModelHandle, as_matrix


def gradient(handle: ModelHandle, module: torch.nn.Module, name: str, ask: Ask, answer: str) -> torch.Tensor:
    """(d, f) gradient of the answer's mean cross-entropy by one weight, by autograd through the whole model."""
    batch = collate(handle, [ask], [answer_ids(handle, ask, answer)], end=True)
    weight = handle.parameter(name).requires_grad_(True)
    try:
        logits = handle.model(**batch.inputs, use_cache=False).logits[batch.before_answer].float()
        loss = torch.nn.functional.cross_entropy(logits, batch.answer_ids)
        (found,) = torch.autograd.grad(loss, [weight])
    finally:
        weight.requires_grad_(False)
    return as_matrix(module, found)


def pseudo_row(net: Mapping[str, np.ndarray], i: int, shape: str, row: np.ndarray, blocks: int = 2) -> np.ndarray:
    """(f + d,) equations 2 and 3 for one position's [u; delta], float64."""
    z = (row - net[f"mean.{i}"]) / net[f"dev.{i}"]
    for k in range(blocks):
        v, u, b = (net[f"{x}.{shape}.{k}"] for x in "VUb")
        inner = np.array([sum(v[r, n] * z[n] for n in range(len(z))) for r in range(len(v))])
        full = np.array([sum(u[n, r] * inner[r] for r in range(len(inner))) + b[n] for n in range(len(z))])
        s, o = net[f"s.{i}.{k}"], net[f"o.{i}.{k}"]
        z = np.array([z[n] + max(0.0, s[n] * full[n] + o[n]) for n in range(len(z))])
    return z


def change(net: Mapping[str, np.ndarray], i: int, shape: str, us: np.ndarray, deltas: np.ndarray) -> np.ndarray:
    """(d, f) equation 4, what is added to the weight: -alpha times the sum over positions of delta~ u~^T."""
    f, out = us.shape[1], np.zeros((deltas.shape[1], us.shape[1]))
    for u, delta in zip(us, deltas):
        z = pseudo_row(net, i, shape, np.concatenate([u, delta]))
        out -= net[f"alpha.{i}"] * np.outer(z[f:], z[:f])
    return out
