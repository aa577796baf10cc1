"""How often intervals hold the truth: simulated answers on the designs of real streams, whose clusters are those of the analysis.

The answer to a question is right where a normal variable of its subject, its picture and the question itself lies under a
threshold, so that the true share is known and the same question always has the same answer.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm

from analysis.metrics.answers import SIGNED
from analysis.metrics.bootstrap import Draws, Resampler, combine, harmonic
from analysis.reading.clusters import UNRELATED, number_clusters
from streams.base import StreamConfig
from testbed.core.registry import STREAMS

DATA = os.environ.get("TESTBED_DATA")
PARTS = {"subject": 0.3, "image": 0.2, "asked": 0.5}
"""Share of the variance of an answer that its subject, its picture and the question itself have."""
LEAST_CLUSTERS = 20
PANEL = 400
"""Questions of a split in a panel."""
SOURCES = {"world-yearly": "", "okedit-yearly": "", "counterfact-yearly": ".", "zsre-yearly": ".", "knowedit-yearly": "."}
SOURCES |= {"dated-facts": ".", "mmedit-yearly": "mmedit"}
"""Stream to its folder under TESTBED_DATA; empty for the simulated world."""
BATCH = 50
"""Simulations that are computed together."""
SHARES = {"half": 0.5, "most": 0.9}
"""Of answers that are right; three in ten of them are lost."""


@dataclass(frozen=True)
class Design:
    """Answers of each split to a panel of questions, with their clusters."""

    splits: dict[str, pd.DataFrame]
    clusters: int


def design(name: str, edits: int) -> Design:
    """The questions of a stream about its first edits."""
    root = Path(DATA) / SOURCES[name] if SOURCES[name] and DATA else None
    stream = STREAMS.get(name)(StreamConfig(data_root=root))
    made = stream.events(edits)
    events = pd.DataFrame([{"edit_id": e.id, "subject": e.subject, "prompt": e.prompt, "image": e.image and e.image.key} for e in made])
    asked = [q for e in made for q in stream.questions(e)]
    fields = [{"event_id": q.event_id, "split": q.split, "prompt": q.prompt, "image": q.image and q.image.key} for q in asked]
    questions = pd.DataFrame(fields).astype({"image": object})
    events = events.astype({"image": object, "subject": object})
    clusters = number_clusters(events, questions)
    questions["subject"] = questions["event_id"].map(events.set_index("edit_id")["subject"])
    rng = np.random.default_rng(0)
    groups = {str(k): own.iloc[rng.permutation(len(own))[:PANEL]].assign(weight=1.0) for k, own in questions.groupby("split")}
    return Design(groups, clusters)


def latent(rows: pd.DataFrame, rng: np.random.Generator, simulations: int) -> np.ndarray:
    """A standard normal variable for each answer and simulation, made of those of its subject, its picture and its question."""
    parts = {k: v for k, v in PARTS.items() if k != "subject" or rows["split"].iloc[0] not in UNRELATED}
    total = np.zeros((len(rows), simulations))
    for column, share in parts.items():
        codes = pd.factorize(rows[column].where(rows[column].notna(), rows["asked"].astype(str)))[0]
        total += np.sqrt(share / sum(parts.values())) * rng.standard_normal((codes.max() + 1, simulations))[codes]
    return total


def scores(rows: pd.DataFrame, share: float, rng: np.random.Generator, simulations: int = 1) -> np.ndarray:
    """Simulated answers of which a share is right, (answers, simulations)."""
    return (latent(rows, rng, simulations) < norm.ppf(share)).astype(float)


def means_of(rows: pd.DataFrame, values: np.ndarray, resampler: Resampler, bounds: tuple[float, float] = (0.0, 1.0)) -> list[Draws]:
    """The mean of each simulation."""
    return [replace(d, bounds=bounds) for d in resampler.means(rows, np.ones(len(rows)), values) if d is not None]


def metrics(plan: Design, share: float, resampler: Resampler, rng: np.random.Generator) -> dict[str, tuple[list[Draws], float]]:
    """Statistics of each kind and split, one for each simulation, with their true value."""
    out: dict[str, tuple[list[Draws], float]] = {}
    for split, rows in plan.splits.items():
        now = scores(rows, share, rng, BATCH)
        later = now * scores(rows, 0.7, rng, BATCH)
        out[split] = means_of(rows, now, resampler), share
        out[f"{split} lost"] = means_of(rows, now - later, resampler, SIGNED), share * 0.3
        out[f"{split} pair"] = [a - b for a, b in zip(out[split][0], means_of(rows, later, resampler))], share * 0.3
    kinds = [k for k in ("text_generality", "locality_hard", "locality_sibling") if k in plan.splits]
    if len(kinds) > 1:
        out["harmonic mean"] = [combine(harmonic, *parts) for parts in zip(*(out[k][0] for k in kinds))], share
    return out


def coverage(plan: Design, share: float, simulations: int, replicates: int) -> dict[str, float]:
    """Share of simulations in which the interval holds the truth, by metric with enough clusters."""
    rng = np.random.default_rng(5)
    resampler = Resampler(plan.clusters, rng, replicates)
    hits: dict[str, list[bool]] = {}
    for _ in range(simulations // BATCH):
        for name, (drawn, truth) in metrics(plan, share, resampler, rng).items():
            for draws in drawn:
                entry = draws.interval()
                if (draws.carrying or 0) >= LEAST_CLUSTERS and entry["low"] is not None and entry["high"] is not None:
                    hits.setdefault(name, []).append(entry["low"] <= truth <= entry["high"])
    return {name: float(np.mean(own)) for name, own in hits.items()}


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    result = coverage(design("world-yearly", 200), 0.7, 100, 200)
    assert {"edit", "locality_far", "locality_hard lost", "text_generality pair", "harmonic mean"} <= set(result)
    assert all(0.86 <= share <= 1 for share in result.values()), result
    assert 0.92 <= np.mean(list(result.values())) <= 0.98


def test_clusters_by_subject_alone_would_be_far_too_narrow_where_edits_share_their_questions() -> None:
    rows = pd.DataFrame({"split": "locality_far", "subject": [f"s{i}" for i in range(200)], "image": None, "weight": 1.0})
    rows["prompt"] = [f"question {i % 12}" for i in range(200)]
    events = pd.DataFrame({"edit_id": rows["subject"], "subject": rows["subject"], "prompt": rows["subject"], "image": None})
    questions = rows.assign(event_id=rows["subject"])[["event_id", "split", "prompt", "image", "subject", "weight"]]
    plan = Design({"locality_far": questions}, number_clusters(events, questions))
    assert questions["cluster"].nunique() == 12
    rng, hits = np.random.default_rng(0), []
    for cluster in (questions["cluster"], np.arange(200)):
        resampler, held = Resampler(200, rng, 200), 0
        own = plan.splits["locality_far"].assign(cluster=cluster)
        for _ in range(100):
            (draws,) = means_of(own, scores(own, 0.5, rng), resampler)
            entry = draws.interval()
            held += bool(entry["low"] <= 0.5 <= entry["high"])
        hits.append(held / 100)
    assert hits[0] > 0.88
    assert hits[1] < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("share", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("edits", [200, 500, 2000])
@pytest.mark.parametrize("name", SOURCES)
def test_every_metric_of_every_stream_covers_between_93_and_97_of_100(name: str, edits: int, share: float) -> None:
    if SOURCES[name] and DATA is None:
        pytest.skip("needs the files of TESTBED_DATA")
    result = coverage(design(name, edits), share, 2000, 500)
    once = np.sqrt(0.95 * 0.05 / 2000)
    assert {k: v for k, v in result.items() if not 0.93 - once <= v <= 0.97 + once} == {}
