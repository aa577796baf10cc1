"""Asking the edited model of a run folder: the answer of the step that is named, the base's beside it, the edits that acted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from testbed.ask import AskConfig, AskResult, Fired, answer, ask, lines, main
from testbed.core.events import Ask
from testbed.core.registry import EDITORS
from testbed.experiment.config import BadConfig, RunConfig
from testbed.experiment.rebuild import rebuild
from tests.helpers.models import folder
from tests.helpers.small_run import EDITS, small_run

NEW = 2
"""New tokens of the small run's answers."""


def asked(editor: str, question: str, **given: object) -> AskResult:
    return ask(AskConfig(small_run(), question, editor=editor, max_new_tokens=NEW, device="cpu", **given))  # type: ignore[arg-type]


def records(editor: str) -> list[dict]:
    rows = [r for p in sorted((small_run() / editor / "records").glob("*.parquet")) for r in pq.read_table(p).to_pylist()]
    return [r for r in rows if r["split"] in ("edit", "text_generality") and r["generated"] is not None]


def prompts() -> dict[str, str]:
    return {q["question_id"]: q["prompt"] for q in pq.read_table(small_run() / "questions.parquet").to_pylist()}


@pytest.mark.parametrize("editor", ["noop", "finetune", "balancedit"])
def test_any_step_answers_as_the_run_did(editor: str) -> None:
    """First and last record of the editor, early and late: the same text, the same base answer, the same notes."""
    rows = records(editor)
    assert rows[0]["probe_step"] < rows[-1]["probe_step"]
    for row in (rows[0], rows[-1]):
        found = asked(editor, prompts()[row["question_id"]], as_of=row["probe_step"])
        assert (found.editor, found.step) == (editor, row["probe_step"])
        assert found.answer == row["generated"]
        assert found.unedited == row["base_answer"]
        noted = {k: v for k, v in json.loads(row["extras"]).items() if k in ("entry", "used")}
        assert {k: v for k, v in found.extras.items() if k in ("entry", "used")} == noted


def test_before_the_first_edit_the_answer_is_the_unedited_models() -> None:
    for editor in ("finetune", "balancedit"):
        found = asked(editor, "Who owns the ship 3?", as_of=0)
        assert found.answer == found.unedited


def test_a_gated_editor_names_the_edit_that_fired_with_its_step() -> None:
    stored = rebuild(small_run(), {"device": "cpu"})
    editor = stored.at("balancedit", EDITS)
    newest = {a.event.prompt: (a.event, s.checkpoint.step) for s in stored.run.schedule.steps for a in s.edits}
    assert len(newest) < EDITS
    for prompt, (event, step) in newest.items():
        found = answer(stored, editor, EDITS, Ask(prompt), NEW)
        assert found.fired == (Fired(event.id, event, step),)
        (shown,) = [text for label, text in lines(found) if label == "fired"]
        assert f"{prompt} -> {event.target} (step {step}," in shown


def test_without_an_edit_that_fires_it_says_so() -> None:
    shown = dict(lines(asked("noop", "Who owns the ship 3?")))
    assert shown["fired"] == "no edit: the question was left to the unedited model"
    assert shown["edited"] == shown["unedited"]
    assert dict(lines(asked("finetune", "Who owns the ship 3?")))["fired"].startswith("no single edit")
    part = AskResult("e", 1, "x", "y", (Fired("memory 1"),), {})
    assert lines(part)[-1] == ("fired", "memory 1")


def test_asking_leaves_the_editor_as_it_was() -> None:
    stored = rebuild(small_run(), {"device": "cpu"})
    editor = stored.at("balancedit", 3)
    before = {k: v.clone() for k, v in editor.state_dict().items() if isinstance(v, torch.Tensor)}
    first = answer(stored, editor, 3, Ask("Who owns the ship 3?"), NEW)
    assert answer(stored, editor, 3, Ask("Who owns the ship 3?"), NEW) == first
    assert before
    assert all(torch.equal(editor.state_dict()[k], v) for k, v in before.items())


WRONG = [
    ({"editor": "memit"}, "has no editor 'memit'; it has noop, finetune, balancedit"),
    ({"editor": ""}, "--editor must say which of noop, finetune, balancedit"),
    ({"as_of": -1}, "--as-of -1 is no step of the run: there are 0"),
    ({"as_of": EDITS + 1}, f"to {EDITS}"),
    ({"question": " "}, "the question is empty"),
    ({"question": "ship " * 300}, "reads 256: ask in fewer words"),
    ({"image": Path("x.png")}, "reads no pictures: leave --image out"),
]


@pytest.mark.parametrize(("given", "message"), WRONG[2:5], ids=range(3))
def test_mistakes_of_the_command_are_found_before_a_model_loads(given: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("testbed.ask.rebuild", None)
    with pytest.raises(BadConfig, match=message):
        asked(**{"editor": "finetune", "question": "Who?", **given})


@pytest.mark.parametrize(("given", "message"), WRONG, ids=range(len(WRONG)))
def test_mistakes_are_reported(given: dict, message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        asked(**{"editor": "finetune", "question": "Who?", **given})


def test_an_editor_that_is_reported_the_truth_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    noop = EDITORS.get("noop")
    monkeypatch.setattr(noop, "traits", replace(noop.traits, told_truth=True))
    with pytest.raises(BadConfig, match="is told the right answers of the run's own questions"):
        asked("noop", "Who?")


def test_a_picture_is_asked_about_from_its_file(tmp_path: Path) -> None:
    from testbed.experiment import runner

    out = tmp_path / "run"
    config = RunConfig("okedit-yearly", ("noop",), str(folder("llava")), edits=2, device="cpu", out=out, probe_budget=1, max_new_tokens=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "finish", lambda out: {})
        runner.study(config)
    Image.new("RGB", (48, 48), (200, 30, 30)).save(tmp_path / "red.png")
    Image.effect_noise((48, 48), 90).convert("RGB").save(tmp_path / "noise.png")
    answers = {n: ask(AskConfig(out, "What is it?", image=tmp_path / n, device="cpu")).answer for n in ("red.png", "noise.png")}
    assert answers["red.png"] != answers["noise.png"]
    assert main([str(out), "What is it?", "--image", str(tmp_path / "none.png")]) == 2


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    here = [str(small_run()), "Who owns the ship 3?", "--editor", "balancedit", "--max-new-tokens", str(NEW), "--device", "cpu"]
    assert main([*here, "--as-of", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "balancedit after step 2"
    assert [line.split(":")[0] for line in printed[1:]] == ["edited", "unedited", "fired"]
    assert main([*here, "--as-of", "99"]) == 2
    assert "--as-of 99 is no step" in capsys.readouterr().err
