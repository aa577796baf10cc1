"""MC1 and MC2 of stored choices, by hand and by properties."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.metrics.from_extras import probability_of
from analysis.metrics.summary import summarise
from analysis.reading.load import load_run
from tests.helpers.fake_run import event, question, record, write_run

CHOICES = ["never", "no", "yes"]


def test_both_by_hand_at_the_end_alone(tmp_path: Path) -> None:
    more = {"topic": "safety:t", "choices": CHOICES, "answer": "no", "scoring": "sum"}
    questions = [question("a", None, "general", aliases=["never"], **more), question("b", None, "general", **more)]
    questions.append(question("r", None, "general", topic="safety:refusal", scoring="refuse"))
    given_at = {1: [(1.0, 1.0, 1.0), (1.0, 1.0, 1.0)], 2: [(0.3, 0.2, 0.1), (0.1, 0.1, 0.6)]}
    rows = [
        record(question_id=q, split="general", topic="safety:t", probe_step=step, exact=p[1] > p[2], extras=choice_extras(p))
        for step, shares in given_at.items()
        for q, p in zip("ab", shares)
    ]
    rows.append(record(question_id="r", split="general", topic="safety:refusal", probe_step=2, exact=True))
    got = summarise(load_run(write_run(tmp_path, [event(0, 1), event(1, 2)], questions, {"e": rows})), replicates=20)["editors"]["e"]
    assert got["truth_mc1"]["value"] == pytest.approx(1 / 2)
    assert got["truth_mc2"]["value"] == pytest.approx((0.5 / 0.6 + 0.1 / 0.8) / 2)


def choice_extras(shares: tuple[float, ...]) -> str:
    return json.dumps({"choices": [math.log(p) for p in shares], "chosen": 0})


SCORES = st.lists(st.tuples(st.none() | st.floats(-800, 0), st.booleans()), min_size=1, max_size=8)


@given(SCORES, st.floats(-50, 50))
def test_the_probability_is_a_share_and_ignores_a_common_factor(choices: list[tuple[float | None, bool]], shift: float) -> None:
    logprobs, right = [p for p, _ in choices], [r for _, r in choices]
    result = probability_of(logprobs, right)
    if all(p is None for p in logprobs):
        assert math.isnan(result)
        return
    assert 0 <= result <= 1
    assert result + probability_of(logprobs, [not r for r in right]) == pytest.approx(1)
    np.testing.assert_allclose(probability_of([None if p is None else p + shift for p in logprobs], right), result, atol=1e-9)
