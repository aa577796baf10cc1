"""Laws of the metrics, for any answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from analysis.metrics.bootstrap import Resampler
from analysis.metrics.catalogue import metric_of
from analysis.metrics.summary import measure
from analysis.reading.load import Run
from analysis.reading.records import SCORING_MODES
from tests.helpers.small_runs import ask, now, small

hits = st.lists(st.integers(0, 2), min_size=4, max_size=4)
chances = st.lists(st.floats(0.05, 1), min_size=4, max_size=4)
quiet = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def measured(run: Run, frame_change=lambda rows: rows) -> dict[str, float]:
    editor = run.editors["e"]
    changed = type(editor)(editor.name, editor.folder, frame_change(editor.records), editor.reports, editor.base)
    return {k: d.value for k, d in measure(run, changed, Resampler(run.clusters, np.random.default_rng(0), 20)).items()}


@quiet
@given(first=hits, last=hits, chance=chances)
def test_properties_of_any_answers(
    tmp_path_factory: pytest.TempPathFactory, first: list[int], last: list[int], chance: list[float]
) -> None:
    rows = [now(i, h) for i, h in enumerate(first)] + [ask(i, 4, h, incl_prob=p) for i, (h, p) in enumerate(zip(last, chance))]
    rows += [ask(i, 4, h, s) for i, h in enumerate(last) for s in ("text_generality", "image_generality", "locality_hard")]
    run = small(tmp_path_factory.mktemp("properties"), rows)
    got = measured(run)
    for name, value in got.items():
        assert (-1 if metric_of(name).unit == "difference" else 0) <= value <= 1
    shuffled = measured(run, lambda r: r.sample(frac=1, random_state=3))
    assert shuffled == pytest.approx(got)
    scaled = measured(run, lambda r: r.assign(weight=r["weight"] * 7))
    assert scaled == pytest.approx(got)
    assert min(last) / 2 - 1e-9 <= got["edit_success"] <= max(last) / 2 + 1e-9


@pytest.mark.ci
@quiet
@given(constant=hits, chance=chances)
def test_constant_answers_are_never_forgotten(tmp_path_factory: pytest.TempPathFactory, constant: list[int], chance: list[float]) -> None:
    rows = [now(i, h) for i, h in enumerate(constant)]
    rows += [ask(i, s, constant[i], incl_prob=chance[i]) for s in (2, 4) for i in range(s)]
    got = measured(small(tmp_path_factory.mktemp("constant"), rows))
    zero = [m for m in got if m.startswith(("forgetting", "backward"))]
    assert {m: got[m] for m in zero} == pytest.approx(dict.fromkeys(zero, 0.0))
    assert len(zero) == 3 * len(SCORING_MODES)


def test_an_answer_of_weight_two_counts_as_two_answers(tmp_path: Path) -> None:
    one = measured(small(tmp_path / "a", [ask(0, 4, 2), ask(1, 4, 0)]))
    doubled = measured(small(tmp_path / "b", [ask(0, 4, 2, incl_prob=0.5), ask(1, 4, 0), ask(2, 4, 0)]))
    assert one["edit_success"] == doubled["edit_success"] == 0.5
