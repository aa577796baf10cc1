"""KE's network from the paper's formulas: torch's own LSTM and weight normalisation, and whole matrices, one edit at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


def condition(net: Mapping[str, Tensor], embedded: Tensor) -> Tensor:
    """(c,) for the embeddings (T, e) of one text."""
    hidden = net["lstm.forward.state"].shape[1]
    lstm = nn.LSTM(embedded.shape[1], hidden, bidirectional=True, batch_first=True)
    with torch.no_grad():
        for side, suffix in (("forward", ""), ("backward", "_reverse")):
            getattr(lstm, f"weight_ih_l0{suffix}").copy_(net[f"lstm.{side}.input"])
            getattr(lstm, f"weight_hh_l0{suffix}").copy_(net[f"lstm.{side}.state"])
            getattr(lstm, f"bias_ih_l0{suffix}").copy_(net[f"lstm.{side}.bias"])
            getattr(lstm, f"bias_hh_l0{suffix}").zero_()
        _, (last, _) = lstm(embedded[None])
    return torch.tanh(net["condition.weight"] @ torch.cat([last[0, 0], last[1, 0]]) + net["condition.bias"])


def change(net: Mapping[str, Tensor], i: int, of: Tensor, gradient: Tensor, s: float) -> Tensor:
    """(d, f) equation 1 for a condition (c,) and the gradient (d, f)."""
    d, f = gradient.shape
    out = _linear(net, f"head.{i}.1", torch.tanh(_linear(net, f"head.{i}.0", of)))
    r_a, c_a, r_b, c_b, eta = out.split([d, f, d, f, 1])
    a, b = torch.outer(r_a.softmax(0), c_a), torch.outer(r_b.softmax(0), c_b)
    return s * torch.sigmoid(eta[0]) * (a * gradient + b)


def _linear(net: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    direction = net[f"{name}.direction"]
    layer = weight_norm(nn.Linear(direction.shape[1], direction.shape[0]))
    with torch.no_grad():
        layer.parametrizations.weight.original0.copy_(net[f"{name}.size"][:, None])  # type: ignore[union-attr]
        layer.parametrizations.weight.original1.copy_(direction)  # type: ignore[union-attr]
        layer.bias.copy_(net[f"{name}.bias"])
        return layer(x[None])[0]
