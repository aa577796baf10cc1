"""The bootstrap: point values, coverage, degenerate cases, invariances."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.metrics import bootstrap
from analysis.metrics.bootstrap import Resampler, percentile, widen


def wilson(successes: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (1927), as a reference."""
    if n <= 0:
        return 0.0, 1.0
    z2, p = 1.959963984540054**2, successes / n
    centre, half = p + z2 / (2 * n), np.sqrt(z2 * (p * (1 - p) / n + z2 / (4 * n * n)))
    return max(0.0, float((centre - half) / (1 + z2 / n))), min(1.0, float((centre + half) / (1 + z2 / n)))


def units(cluster: np.ndarray) -> pd.DataFrame:
    """Answers to questions of their own in these clusters."""
    return pd.DataFrame({"cluster": cluster, "asked": np.arange(len(cluster))})


def mean_of(scores: np.ndarray, cluster: np.ndarray | None = None, replicates: int = 400) -> bootstrap.Draws:
    cluster = np.arange(len(scores)) if cluster is None else cluster
    resampler = Resampler(int(cluster.max()) + 1, np.random.default_rng(0), replicates)
    draws = resampler.means(units(cluster), np.ones(len(scores)), scores[:, None].astype(float))[0]
    if draws is None:
        raise ValueError("nothing was scored")
    return draws


def test_a_weighted_mean_is_exact_and_absent_without_scores() -> None:
    resampler = Resampler(3, np.random.default_rng(0), 50)
    scores = np.array([[1.0, np.nan], [0.0, np.nan], [np.nan, np.nan]])
    first, second = resampler.means(units(np.arange(3)), np.array([1.0, 3.0, 5.0]), scores)
    assert first is not None
    assert (first.value, first.n) == (0.25, 2)
    assert second is None


def test_cells_agree_with_means_of_their_parts() -> None:
    rng = np.random.default_rng(2)
    score, cell, cluster = rng.random(60), rng.integers(0, 3, 60), rng.integers(0, 20, 60)
    resampler = Resampler(20, rng, 100)
    cells = resampler.cells(units(cluster), score, np.ones(60), cell, 4)
    for k in range(3):
        alone = resampler.means(units(cluster[cell == k]), np.ones((cell == k).sum()), score[cell == k][:, None])[0]
        assert cells[k] is not None
        assert alone is not None
        np.testing.assert_allclose(cells[k].values, alone.values, rtol=1e-5)
    assert cells[3] is None


def test_replicates_are_those_of_a_plain_bootstrap() -> None:
    scores = np.random.default_rng(3).random(50)
    draws = mean_of(scores, replicates=4000)
    assert draws.values[1:].std() == pytest.approx(scores.std() / np.sqrt(50), rel=0.06)


@pytest.mark.parametrize("rate", [0.2, 0.5, 0.9])
def test_the_interval_covers_the_truth_about_as_often_as_it_says(rate: float) -> None:
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        own = rng.beta(rate * 8, (1 - rate) * 8, 60)
        cluster = np.repeat(np.arange(60), 3)
        entry = mean_of((rng.random(180) < own[cluster]).astype(float), cluster, 200).interval()
        covered += entry["low"] <= rate <= entry["high"]
    assert 0.88 <= covered / 200 <= 0.99


def test_clusters_widen_the_interval() -> None:
    rng = np.random.default_rng(5)
    same = np.repeat(rng.integers(0, 2, 40), 5)
    together, apart = mean_of(same, np.repeat(np.arange(40), 5)).interval(), mean_of(same).interval()
    assert together["high"] - together["low"] > 1.5 * (apart["high"] - apart["low"])


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_share_of_none_or_all_gets_wilsons_interval(value: float) -> None:
    entry = mean_of(np.full(40, value)).interval()
    assert (entry["low"], entry["high"]) == pytest.approx(wilson(40 * value, 40))
    assert entry["high"] - entry["low"] > 0.05


def test_fewer_than_ten_distinct_questions_have_no_interval() -> None:
    rows = pd.DataFrame({"cluster": np.arange(40), "asked": np.arange(40) % 9})
    resampler = Resampler(40, np.random.default_rng(0), 50)
    (nine,) = resampler.means(rows, np.ones(40), np.arange(40.0)[:, None] % 2)
    (ten,) = resampler.means(rows.assign(asked=np.arange(40) % 10), np.ones(40), np.arange(40.0)[:, None] % 2)
    assert nine is not None
    assert ten is not None
    assert nine.interval() == {"value": 0.5, "low": None, "high": None, "n": 40, "questions": 9}
    assert ten.interval()["questions"] == 10
    assert ten.interval()["low"] is not None


def test_answers_of_several_parts_are_counted_and_the_fewest_questions_decide() -> None:
    few, many = mean_of(np.arange(9) % 2.0), mean_of(np.arange(30) % 2.0)
    both = bootstrap.combine(bootstrap.harmonic, few, many)
    assert both.interval() == {"value": pytest.approx(8 / 17), "low": None, "high": None, "n": 39, "questions": 30}
    assert (many - many).n == 30


def test_wilson_against_published_values() -> None:
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 0) == (0.0, 1.0)


def test_one_cluster_has_an_interval_of_almost_the_whole_range() -> None:
    entry = mean_of(np.full(30, 0.5), np.zeros(30, int)).interval()
    assert entry["high"] - entry["low"] > 0.9


def test_a_difference_without_discordant_answers_is_not_certain() -> None:
    draws = mean_of(np.array([0.0, 1.0] * 20))
    entry = (draws - draws).interval()
    assert (entry["value"], entry["low"], entry["high"]) == pytest.approx((0.0, -widen(0, 40, (-1, 1))[1], widen(0, 40, (-1, 1))[1]))


def test_undefined_and_infinite_replicates() -> None:
    assert percentile(np.array([np.nan, 1.0, 2.0, 3.0])) == (1.0, 3.0)
    assert np.isnan(percentile(np.array([np.nan]))).all()
    open_end = bootstrap.Draws(np.array([5.0, 4.0, 6.0, np.inf, np.inf]), 4, np.arange(10), 4, None).interval()
    assert (open_end["low"], open_end["high"]) == (4.0, None)


def test_many_clusters_are_pooled_without_changing_the_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(6).random(3000)
    whole = mean_of(scores, replicates=800)
    monkeypatch.setattr(bootstrap, "MOST_GROUPS", 300)
    pooled = mean_of(scores, replicates=800)
    assert pooled.value == whole.value
    assert pooled.values[1:].std() == pytest.approx(whole.values[1:].std(), rel=0.2)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=10, max_size=30))
def test_an_interval_lies_in_bounds_and_holds_its_value(scores: list[float]) -> None:
    entry = mean_of(np.array(scores), replicates=50).interval()
    assert 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 1


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=20), st.integers(2, 4))
def test_copies_of_every_answer_within_its_cluster_change_nothing(scores: list[float], copies: int) -> None:
    plain = np.array(scores)
    cluster = np.arange(len(plain))
    copied = mean_of(np.tile(plain, copies), np.tile(cluster, copies), 50)
    np.testing.assert_allclose(copied.values, mean_of(plain, cluster, 50).values, rtol=1e-5)
