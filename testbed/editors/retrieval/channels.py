"""Several channels of similarity between a question with a picture and the facts, fused with weights of the question's own.

The form is that of CARML (NeurIPS 2025, OpenReview hdJXzKZjY9), which weights channels by how uncertain each is within itself and how
much it conflicts with the others; its code is not released, so that the formula is this project's. With p_c the softmax of a channel's
cosines over the candidates, divided by a temperature,

    u_c = H(p_c) / log m                                    uncertainty, m candidates                             (1)
    k_c = mean over the others of JS(p_c, p_c') / log 2     conflict                                              (2)
    weights = softmax over channels of -(u_c + k_c)         they sum to 1                                         (3)

The joint channel is the cosine of text and picture behind one another, both of length 1: the mean of the two other cosines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

CHANNELS = ("visual", "textual", "joint")
JOINT = "joint"
"""The channel that the retriever takes where nothing is fused."""


@dataclass(frozen=True)
class ChannelFusion:
    """names: the channels, some of `CHANNELS`. candidates: facts that each channel proposes. temperature: of the softmax."""

    names: tuple[str, ...]
    candidates: int = 15
    temperature: float = 0.05

    def fused(self, similarity: Mapping[str, np.ndarray], alive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) float32 fused cosines and (n,) bool the candidates, of (n,) cosines by channel and the facts that may be taken."""
        rows = self._proposed(similarity, alive)
        out, kept = np.zeros(len(alive), np.float32), np.zeros(len(alive), bool)
        if len(rows):
            chosen = np.stack([similarity[name][rows] for name in self.names])
            out[rows], kept[rows] = channel_weights(chosen, self.temperature) @ chosen, True
        return out, kept

    def _proposed(self, similarity: Mapping[str, np.ndarray], alive: np.ndarray) -> np.ndarray:
        """The rows that some channel has among its nearest; of equally near ones the newer."""
        among = np.flatnonzero(alive)
        found = [among[np.lexsort((-among, -np.round(similarity[name][among], 6)))[: self.candidates]] for name in self.names]
        return np.unique(np.concatenate(found))


def channel_weights(similarity: np.ndarray, temperature: float) -> np.ndarray:
    """(c,) equation 3 for cosines (c, m) of m candidates; one channel has the weight 1, and all are alike where there is one candidate."""
    scaled = similarity.astype(np.float64) / temperature
    p = np.exp(scaled - scaled.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    c, m = p.shape
    uncertainty = _entropy(p) / np.log(m) if m > 1 else np.zeros(c)
    apart = _entropy((p[:, None] + p[None]) / 2) - (_entropy(p)[:, None] + _entropy(p)[None]) / 2
    conflict = apart.sum(1) / (max(c - 1, 1) * np.log(2))
    weights = np.exp(-(uncertainty + conflict))
    return weights / weights.sum()


def _entropy(p: np.ndarray) -> np.ndarray:
    """(..,) entropy of distributions (.., m), nats."""
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)


def named_channels(text: str) -> tuple[str, ...]:
    """The channels that a setting names, joined by plus signs. Raises ValueError for an unknown one and for one that is named twice."""
    names = tuple(text.split("+"))
    if unknown := [n for n in names if n not in CHANNELS]:
        raise ValueError(f"channels must be some of {', '.join(CHANNELS)}, joined by +, got {unknown[0]!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"channels must differ from one another, got {text!r}")
    return names


def fusion_of(text: str, candidates: int, facts: int) -> ChannelFusion | None:
    """The fusion of named channels, with no fewer candidates than facts that are retrieved; None for the joint channel alone."""
    names = named_channels(text)
    return None if names == (JOINT,) else ChannelFusion(names, max(candidates, facts))
