"""The published ablation of w_pos on the tiny model: what one ball alone takes in, by its radius, before any neighbour caps it."""

from __future__ import annotations

from collections import defaultdict

import pytest

from streams.base import Stream
from testbed.core.events import EditBatch
from testbed.editors.codebook.balancedit import BalancEdit, BalancEditConfig, radius
from testbed.editors.codebook.nearest import direct
from testbed.experiment.config import RunConfig
from testbed.model import loading

SPLITS = ("text_generality", "image_generality", "locality_hard", "locality_sibling", "locality_far")


def captured(n: int, weights: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0), seed: int = 7) -> dict[float, dict[str, float]]:
    """Share of each split's questions that lie in the ball of their own edit alone, over the development stream's first new facts."""
    stream: Stream = RunConfig(stream="okedit-yearly", seed=seed).resolve_stream().create()
    events = [e for e in stream.events(2 * n) if e.kind == "add"][:n]
    batch = EditBatch(tuple(events), 1, {e.id: stream.paraphrases(e) for e in events})
    near, far = (BalancEdit(BalancEditConfig(w_pos=w)) for w in (1.0, 0.0))
    handle = loading.load("tiny", device="cpu")
    for editor in (near, far):
        editor.prepare(handle, stream.train_pool())
    anchors = [(a.key, a.radius, b.radius) for a, b in zip(near._scopes(batch), far._scopes(batch))]
    asked = [(i, q) for i, e in enumerate(events) for q in stream.questions(e) if q.split in SPLITS]
    distance = [float(direct(k, anchors[i][0], "euclidean")) for (i, _), k in zip(asked, far._read([q.ask() for _, q in asked]))]
    out = {}
    for w in weights:
        inside: dict[str, list[bool]] = defaultdict(list)
        for (i, q), d in zip(asked, distance):
            inside[q.split].append(d <= radius(w, *anchors[i][1:]))
        out[w] = {split: sum(x) / len(x) for split, x in inside.items()}
    return out


def harmonic(shares: dict[str, float]) -> float:
    parts = (shares["text_generality"], shares["image_generality"], 1 - shares["locality_hard"])
    return 3 / sum(1 / p for p in parts) if min(parts) > 0 else 0.0


def test_the_pattern_of_the_papers_ablation() -> None:
    found = captured(12)
    wide, narrow = found[0.0], found[1.0]
    assert wide["text_generality"] == wide["image_generality"] == 1
    assert wide["locality_hard"] > 0.8
    assert narrow["locality_hard"] == 0
    assert narrow["image_generality"] < 0.2
    assert max(harmonic(found[w]) for w in (0.25, 0.5, 0.75)) > max(harmonic(wide), harmonic(narrow)) + 0.2
    for split in SPLITS:
        assert [found[w][split] for w in sorted(found)] == pytest.approx(sorted((found[w][split] for w in found), reverse=True))
