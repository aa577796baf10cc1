"""The sequential alarm: evidence by hand, false alarms and delay on simulated streams, and the metric of a run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from analysis.metrics.alarm import BETS, EVIDENCE, TOLERATED, alarm_step, detect, power, run_alarm
from analysis.metrics.summary import summarise
from analysis.reading.load import load_run
from tests.helpers.fake_run import event, question, record, write_run

CHECKPOINTS, QUESTIONS = 100, 64
EDGE = 1 - TOLERATED


def raised_at(rng: np.random.Generator, chances: np.ndarray) -> int | None:
    return detect(np.arange(len(chances)), rng.binomial(QUESTIONS, chances), np.full(len(chances), QUESTIONS)).raised


def share_raised(chance: float, runs: int = 400) -> float:
    rng = np.random.default_rng(8)
    return float(np.mean([raised_at(rng, np.full(CHECKPOINTS, chance)) is not None for _ in range(runs)]))


def delays(drop: float, runs: int = 200) -> np.ndarray:
    """Checkpoints from the drop to the alarm; the run is long enough for every one."""
    rng = np.random.default_rng(9)
    chances = np.concatenate([np.full(20, 0.99), np.full(180, drop)])
    result = [raised_at(rng, chances) for _ in range(runs)]
    return np.array([math.inf if f is None else f - 20 for f in result])


def test_evidence_of_three_answers_by_hand() -> None:
    result = detect(np.array([5, 9]), np.array([2, 0]), np.array([3, 4]))
    one = [(1 - 0.1 * b) ** 2 * (1 + 0.9 * b) for b in BETS]
    two = [max(1.0, m) * (1 + 0.9 * b) ** 4 for b, m in zip(BETS, one)]
    np.testing.assert_allclose(result.evidence, [np.mean(one), np.mean(two)])


def test_false_alarms_stay_under_the_stated_rate_at_the_tolerated_loss() -> None:
    bound = CHECKPOINTS / EVIDENCE
    assert share_raised(EDGE) <= bound
    assert detect(np.arange(CHECKPOINTS), np.full(CHECKPOINTS, QUESTIONS), np.full(CHECKPOINTS, QUESTIONS)).false_alarm == bound


def test_a_model_that_keeps_its_answers_raises_no_alarm() -> None:
    assert share_raised(0.99) == 0.0


@pytest.mark.parametrize(("drop", "most"), [(0.8, 6.0), (0.7, 2.0), (0.5, 0.1)])
def test_a_loss_is_found_soon_and_a_larger_one_sooner(drop: float, most: float) -> None:
    result = delays(drop)
    assert (result >= 0).all(), "the alarm was raised before anything was lost"
    assert result.mean() <= most


def test_the_alarm_says_after_which_checkpoint_the_loss_began() -> None:
    kept = np.array([64, 64, 64, 40, 30])
    result = detect(np.array([10, 20, 30, 40, 50]), kept, np.full(5, 64))
    assert (result.raised, result.calm) == (3, 2)


@pytest.mark.parametrize(("kept", "expected"), [((8, 8, 8), (None, None)), ((8, 0, 0), (2.0, 1.0))])
def test_a_run_with_a_fresh_panel_has_an_alarm(tmp_path: Path, kept: tuple, expected: tuple) -> None:
    events = [event(i, i + 1) for i in range(3)]
    questions = [question(f"u{i}", None, "locality_far", answer=None) for i in range(8)]
    fresh = {"probe": "fresh", "panel": "rotating_fresh", "split": "locality_far", "n_tokens": 1, "logprob": -1.0}
    rows = [
        record(question_id=f"u{i}", probe_step=s + 1, exact=i < k, token_hits=int(i < k), **fresh)
        for s, k in enumerate(kept)
        for i in range(8)
    ]
    editor = load_run(write_run(tmp_path, events, questions, {"e": rows})).editors["e"]
    entry = alarm_step(editor)["alarm_step"]
    assert (entry["value"], entry["low"], entry["n"]) == (*expected, 3)


def test_eight_questions_see_a_fall_to_four_fifths_once_in_six_runs_of_ten_checkpoints() -> None:
    assert power(np.full(10, 8)) == pytest.approx(0.17, abs=0.02)
    assert power(np.full(10, QUESTIONS)) > 0.99
    rng = np.random.default_rng(1)
    one_by_one = [detect(np.arange(10), rng.binomial(8, 0.8, 10), np.full(10, 8)).raised is not None for _ in range(1000)]
    assert np.mean(one_by_one) == pytest.approx(power(np.full(10, 8)), abs=0.04)


def test_the_promise_is_that_of_the_run_and_grows_with_its_editors(tmp_path: Path) -> None:
    fresh = {"probe": "fresh", "panel": "rotating_fresh", "split": "locality_far", "n_tokens": 1, "logprob": -1.0, "token_hits": 1}
    rows = [record(question_id=f"u{i}", probe_step=s, exact=True, **fresh) for s in (1, 2, 3) for i in range(8)]
    questions = [question(f"u{i}", None, "locality_far", answer=None) for i in range(8)]
    run = load_run(write_run(tmp_path, [event(0, 1)], questions, {"a": rows, "b": rows, "bound": rows}, references=["bound"]))
    promise = summarise(run, replicates=20)["run"]["alarm"]
    assert promise["false_alarm_at_most"] == pytest.approx(2 * 3 / EVIDENCE)
    assert (promise["questions"], promise["checkpoints"], promise["fall"]) == (8.0, 3, 0.8)
    assert promise["power"] == power(np.full(3, 8))


def test_without_a_fresh_panel_there_is_no_alarm(tmp_path: Path) -> None:
    row = record(question_id="e0-edit", edit_id="e0", token_hits=1, n_tokens=1)
    editor = load_run(write_run(tmp_path, [event(0, 1)], [question("e0-edit", "e0")], {"e": [row]})).editors["e"]
    assert run_alarm(editor) is None
    assert alarm_step(editor) == {}
