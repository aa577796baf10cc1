"""Choice of settings: scores by hand, the search field by field, and the command on a small model."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from testbed import tune
from testbed.core.events import Question
from testbed.core.registry import EDITORS
from testbed.editors.base import BadEditor
from testbed.model.generation import Score
from testbed.model.predictor import ModelPredictor, Response
from testbed.run import parse
from testbed.tuning.search import GRIDS, MOST_SETTINGS, Settings, Trial, answer_accuracy, grid, search
from tests.helpers.models import build, folder


def trial(settings: Settings, success: float = 1.0, perplexity: float = 1.0, **more: float) -> Trial:
    return Trial(settings, success, more.get("generality", success), more.get("locality", success), perplexity, 0.1, 0)


def test_a_score_is_the_harmonic_mean_times_the_ratio_of_perplexities() -> None:
    assert trial({}, 1.0, generality=0.5, locality=0.25).score == pytest.approx(3 / (1 + 2 + 4))
    assert trial({}, 1.0, perplexity=4.0).score == pytest.approx(0.25)
    assert trial({}, 1.0, perplexity=0.5).score == pytest.approx(1.0)
    assert trial({}, 1.0, generality=0.0).score == pytest.approx(3 / (1 + 20 + 1))
    assert trial({}, 1.0, generality=math.nan).score == pytest.approx(1.0)
    assert trial({}, 1.0, perplexity=math.nan).score == 0


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(st.floats(0.01, 1), min_size=1, max_size=9, unique=True), max_size=4))
def test_the_search_goes_field_by_field_and_keeps_the_best(fields: dict[str, list[float]]) -> None:
    """Each value is its own score, so the best setting holds the largest value of every field that was searched through."""
    found = list(search(fields, lambda s: trial(s, 0.01 + math.prod(s.values()) if s else 0.01), 60))
    assert found[0].settings == {} and len(found) <= MOST_SETTINGS
    tried = sum(map(len, fields.values()))
    assert len(found) == min(MOST_SETTINGS, 1 + tried)
    seen = [list(t.settings) for t in found]
    assert all(set(a) <= set(b) | {a[-1] if a else ""} for a, b in pairwise(seen))


def test_a_refused_setting_is_left_out_and_time_ends_the_search() -> None:
    def measure(settings: Settings) -> Trial:
        if settings.get("lr") == 2:
            raise BadEditor("no")
        return trial(settings)

    assert [t.settings for t in search({"lr": [1, 2, 3]}, measure, 60)] == [{}, {"lr": 1}, {"lr": 3}]
    assert [t.settings for t in search({"lr": [1, 2, 3]}, measure, -1)] == [{}]


@pytest.mark.parametrize("editor", sorted(GRIDS))
def test_the_grid_of_every_editor_holds_its_own_fields_and_valid_values(editor: str) -> None:
    cls = EDITORS.get(editor)
    for n_layers in (2, 30):
        fields = grid(editor, n_layers)
        assert 1 + sum(map(len, fields.values())) <= MOST_SETTINGS
        for name, values in fields.items():
            for value in values:
                assert not cls.Config(**{name: value}).problems()


def test_an_answer_that_goes_on_counts_half() -> None:
    questions = [Question("edit", f"Who leads {name}?", "Ana", topic="leaders") for name in ("Rome", "Oslo")]

    class Talks(ModelPredictor):
        def respond(self, asks: Any, answers: Any, max_new_tokens: int = 16) -> list[Response]:
            return [Response(text, Score(np.ones(1, bool), np.zeros(1)), {}) for text in ("Ana, I think", "Ana.")]

    assert answer_accuracy(Talks(build("gpt2")), questions) == pytest.approx((1 + 0.5) / 2)
    assert math.isnan(answer_accuracy(Talks(build("gpt2")), []))


def test_layers_lie_at_their_shares_of_the_depth() -> None:
    assert grid("memit", 30)["layers"][0] == (2, 3, 4, 5, 6)
    assert grid("finetune", 30)["layer"] == [7, 14, 22]
    assert grid("memit", 3)["layers"] == [(0,), (0, 1)]
    assert grid("alphaedit+blue", 30) == grid("alphaedit", 30) == grid("alphaedit[lr=1]", 30)


def rome(i: int) -> dict[str, Any]:
    rewrite = {"prompt": "The tongue of {} is", "subject": f"Person {i}", "relation_id": "P1"}
    answers = {"target_new": {"str": f"new {i % 7}"}, "target_true": {"str": f"old {i % 5}"}}
    return {"requested_rewrite": rewrite | answers, "paraphrase_prompts": [f"Person {i} speaks"], "neighborhood_prompts": [f"He {i} says"]}


def test_the_command_writes_settings_that_a_run_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "counterfact.json").write_text(json.dumps([rome(i) for i in range(120)]))
    out = tmp_path / "small.yaml"
    common = ["--model", str(folder("gpt2")), "--stream", "counterfact-yearly", "--data-root", str(tmp_path)]
    common += ["--edits", "3", "--device", "cpu", "--out", str(out)]
    assert tune.main([*common, "--editor", "finetune", "--values", "lr=0.001,0.01", "steps=5"]) == 0
    assert tune.main([*common, "--editor", "grace", "--values", "steps=5"]) == 0
    said = capsys.readouterr().out
    assert "prompt form: " in said and said.count("finetune: score ") == 4
    chosen = yaml.safe_load(out.read_text())["set"] or []
    assert any(line.startswith("finetune.") for line in chosen)
    assert out.read_text().count("# finetune: counterfact-yearly, 3 development edits") == 1
    config = parse(["--config", str(out), "--editor", "finetune", "grace"])
    assert config.set == tuple(chosen)
    assert tune.main([*common, "--editor", "noop"]) == 2
    assert "nothing is known about what to try for noop" in capsys.readouterr().err
    assert tune.main([*common, "--editor", "finetune", "--values", "lr"]) == 2
