"""What the unedited model believes: the share of old answers, and runs of facts that it holds or gets wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streams.base import BadStream
from testbed.core.events import Ask, EditEvent
from testbed.experiment import beliefs, runner
from testbed.experiment.config import BadConfig, RunConfig, stored_config
from testbed.model.predictor import ModelPredictor
from tests.helpers.models import build, folder


def rome(i: int) -> dict[str, Any]:
    rewrite = {"prompt": "The tongue of {} is", "subject": f"Person {i}", "relation_id": "P1"}
    answers = {"target_new": {"str": f"new {i % 7}"}, "target_true": {"str": f"old {i % 5}"}}
    return {"requested_rewrite": rewrite | answers, "paraphrase_prompts": [f"Person {i} speaks"], "neighborhood_prompts": [f"He {i} says"]}


@pytest.fixture
def knows_even(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that gives the old answers about persons with even numbers."""

    def generate(self: ModelPredictor, asks: list[Ask], n: int) -> list[str]:
        numbers = [int(a.prompt.split("Person ")[1].split()[0]) for a in asks]
        return [f"old {i % 5}, of course" if i % 2 == 0 else "who knows" for i in numbers]

    monkeypatch.setattr(ModelPredictor, "generate", generate)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    (tmp_path / "counterfact.json").write_text(json.dumps([rome(i) for i in range(120)]))
    shared: dict[str, Any] = {"device": "cpu", "prompt": "bare", "probe_budget": 40, "max_new_tokens": 2}
    return RunConfig(
        stream="counterfact-yearly",
        data_root=tmp_path,
        model=str(folder("gpt2")),
        editor=("noop",),
        edits=10,
        out=tmp_path / "run",
        **shared,
    )


def number(e: EditEvent) -> int:
    return int((e.subject or "").removeprefix("Person "))


def test_the_share_of_old_answers_is_counted(knows_even: None, config: RunConfig) -> None:
    events = config.resolve_stream().create().events(60)
    adds = [e for e in events if e.kind == "add"]
    found = beliefs.belief(build("gpt2"), events)
    assert found is not None and found.asked == len(adds)
    assert found.generated == pytest.approx(sum(number(e) % 2 == 0 for e in adds) / len(adds))
    assert 0 <= found.preferred <= 1
    assert len(replace(found, generated=0.1).lines()) == 2 and len(replace(found, generated=0.9).lines()) == 1
    assert beliefs.belief(build("gpt2"), [replace(e, previous=None) for e in events]) is None


@pytest.mark.ci
def test_a_run_of_believed_facts_holds_no_others_and_goes_on_with_them(
    knows_even: None, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, set=("stream.keep=believed", "stream.edits_per_year=4"))
    run = runner.prepare(config.resolve())
    assert [number(e) % 2 for e in run.events] == [0] * 10
    assert [e.year for e in run.events] == [1, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    runner.study(config)
    manifest = json.loads((config.out or Path()).joinpath("manifest.json").read_text())
    assert manifest["belief"]["generated"] == 1.0
    monkeypatch.setattr(beliefs, "_gives", None)  # it would be called to ask again
    again = runner.prepare(stored_config(config.out or Path()).resolve())
    assert again.events == run.events and again.schedule.hash == run.schedule.hash


def test_what_the_model_gets_wrong_is_corrected_with_true_targets(knows_even: None, config: RunConfig) -> None:
    run = runner.prepare(replace(config, set=("stream.keep=wrong",)).resolve())
    assert [number(e) % 2 for e in run.events] == [1] * 10
    for e in (e for e in run.events if e.kind == "add"):
        assert e.target == f"old {number(e) % 5}" and e.previous is None
        assert {q.answer for q in run.stream.questions(e) if q.split in ("edit", "text_generality")} == {e.target}


def test_more_edits_than_such_facts_are_refused_with_their_number(knows_even: None, config: RunConfig) -> None:
    with pytest.raises(BadConfig, match=r"stream.keep=believed: \d+ of the \d+ edits asked are believed, 5000 are wanted: use --edits \d+"):
        runner.prepare(replace(config, edits=5000, set=("stream.keep=believed",)).resolve())
    with pytest.raises(BadStream, match=r"stream.keep=wrong needs true answers"):
        runner.prepare(RunConfig(stream="world-yearly", set=("stream.keep=wrong",), edits=2).resolve())
