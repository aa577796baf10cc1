"""The probe of safety: its requests, its files and their mistakes, and what a run on a random model keeps of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest

from analysis.metrics.summary import summarise
from analysis.reading.load import load_run
from testbed.experiment import runner
from testbed.experiment.config import RunConfig
from testbed.experiment.schedule import Schedule, ScheduleConfig, build
from testbed.model.predictor import ModelPredictor
from testbed.probes.base import ProbeConfig
from testbed.probes.requests import REQUESTS, BadRequests, load
from tests.helpers.models import folder
from tests.helpers.plain_stream import Line, PlainStream

STREAM = PlainStream([Line(1 + i / 10) for i in range(20)])


def asked(also: ProbeConfig) -> dict[int, list[Any]]:
    """The plans of the probe by step."""
    planned: Schedule = build(STREAM, STREAM.all, ScheduleConfig(1, 0, 10**6, asked=also))
    by_step = {s.checkpoint.step: [q.plan for q in s.questions if q.probe == "safety"] for s in planned.steps}
    return {step: plans for step, plans in by_step.items() if plans}


def lines(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def test_the_made_set_pairs_each_harmful_request_with_a_benign_one_and_is_asked_whole() -> None:
    assert len(REQUESTS["harmful"]) == len(REQUESTS["benign"]) == 24
    assert len({*REQUESTS["harmful"], *REQUESTS["benign"]}) == 48
    for plans in asked(ProbeConfig(also=("safety",))).values():
        assert {(p.question.topic, p.question.scoring) for p in plans} == {
            ("safety:harmful_requests", "refuse"),
            ("safety:benign_requests", "comply"),
        }
        assert {p.question.prompt for p in plans} == {*REQUESTS["harmful"], *REQUESTS["benign"]}
        assert {(p.panel, p.incl_prob, p.edit) for p in plans} == {("rotating_requests", 1.0, None)}


def test_of_a_large_file_other_requests_are_drawn_at_each_checkpoint(tmp_path: Path) -> None:
    many = lines(tmp_path / "many.txt", *(f"Request {i}" for i in range(100)))
    by_step = asked(ProbeConfig(also=("safety",), harmful=many))
    drawn = [{p.question.prompt for p in plans if p.question.scoring == "refuse"} for plans in by_step.values()]
    assert len(drawn) > 1 and all(len(d) == 32 for d in drawn) and drawn[0] != drawn[1]
    assert {p.incl_prob for plans in by_step.values() for p in plans if p.question.scoring == "refuse"} == {0.32}


def test_files_are_json_lines_or_text(tmp_path: Path) -> None:
    harmful = lines(tmp_path / "h.jsonl", '{"prompt": " Do harm? ", "source": "mine"}', "", '"Do more?"')
    benign = lines(tmp_path / "b.txt", "Do good?", "", " Do better? ")
    assert load(harmful, benign) == {"harmful": ("Do harm?", "Do more?"), "benign": ("Do good?", "Do better?")}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (['{"prompt": "a"}', "{"], r"h.jsonl:2: expected a JSON object, found '\{'.*; write"),
        (['{"request": "a"}'], "h.jsonl:1: expected the field prompt with a text that is not empty, found 'the fields request'; write"),
        (['{"prompt": 3}'], "found 3; write"),
        (['{"prompt": " "}'], "found ' '; write"),
        (['{"prompt": "a"}', '{"prompt": "a "}'], "h.jsonl:2: expected requests that differ, found that of line 1 again; remove"),
        ([""], "harmful: expected at least one request, found none in .*; write one request in each line"),
        (['{"prompt": "How can I become a judge?"}'], "share the request 'How can I become a judge[?]': .*; take it out of one of them"),
    ],
)
def test_a_mistake_in_a_file_names_what_was_expected_and_found(tmp_path: Path, rows: list[str], said: str) -> None:
    with pytest.raises(BadRequests, match=said):
        load(lines(tmp_path / "h.jsonl", *rows), None)


def test_absent_and_unread_files_are_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for path in (tmp_path / "none.txt", tmp_path / "latin.txt"):
        (problem,) = RunConfig(editor=("noop",), set=(f"probes.harmful={path}", "probes.also=safety")).problems()
        assert problem.startswith("probes: harmful: expected a file of requests") and problem.endswith("give the path of such a file")
    good = lines(tmp_path / "good.txt", "Do harm?")
    assert RunConfig(editor=("noop",), set=(f"probes.harmful={good}", "probes.also=safety")).problems() == []
    (problem,) = RunConfig(editor=("noop",), set=(f"probes.benign={good}",)).problems()
    assert problem == "probes: benign is given, but only the probe safety reads it: add safety to probes.also"


def test_a_run_measures_what_an_editor_keeps_of_the_unedited_models_behaviour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model refuses two of three harmful requests before any edit; edited by fine-tuning, it refuses nothing."""
    harmful = lines(tmp_path / "h.txt", "Harm one?", "Harm two?", "Harm three?")
    benign = lines(tmp_path / "b.txt", "Help one?", "Help two?")
    generate = ModelPredictor.generate

    def says(self: ModelPredictor, asks: Any, *given: Any) -> list[str]:
        refuses = {"Harm one?", "Harm two?"} if self.fingerprint == "base" else set()
        known = {f"{kind} {n}?": "Sure, here is how." for kind in ("Harm", "Help") for n in ("one", "two", "three")}
        known |= dict.fromkeys(refuses, "I can't help with that.")
        return [known.get(a.prompt) or generate(self, [a], *given)[0] for a in asks]

    monkeypatch.setattr(ModelPredictor, "generate", says)
    facts = [json.dumps({"prompt": f"Who owns {i}?", "target": f"Ann {i}"}) for i in range(30)]
    lines(tmp_path / "facts.jsonl", *facts)
    out = tmp_path / "run"
    asks = ("probes.also=safety", f"probes.harmful={harmful}", f"probes.benign={benign}", "finetune.steps=2")
    with patch.object(runner, "finish", lambda out: {}):
        runner.study(RunConfig("jsonl:facts.jsonl", ("noop", "finetune"), str(folder("gpt2")), tmp_path, edits=2, probe_budget=200,
                               max_new_tokens=2, device="cpu", out=out, set=asks))  # fmt: skip
    summary = summarise(load_run(out), replicates=20)["editors"]
    assert (summary["noop"]["refusal_kept"]["value"], summary["noop"]["refusal_kept"]["n"]) == (1.0, 2)
    assert summary["finetune"]["refusal_kept"]["value"] == 0.0
    assert {summary[e]["compliance_kept"]["value"] for e in summary} == {1.0}
    rows = [r for p in (out / "finetune" / "records").glob("*") for r in pq.read_table(p).to_pylist() if r["probe"] == "safety"]
    assert {r["generated"] for r in rows if r["topic"] == "safety:harmful_requests"} == {None}
