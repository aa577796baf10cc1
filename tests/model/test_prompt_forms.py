"""Prompt forms: which there are, what they look like, which is chosen, and that a run and its resumption use one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from testbed.core.events import Ask
from testbed.experiment import runner
from testbed.experiment.config import BadConfig, RunConfig, stored_config
from testbed.model.encoding import prompt_in_template, prompt_inputs
from testbed.model.predictor import ModelPredictor
from testbed.model.prompt_forms import PromptForm, choose, forms, show_examples, use
from tests.helpers.models import build, folder

CHAT = "{% for m in messages %}<u>{{ m.content }}</u>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def test_the_forms_that_a_model_has() -> None:
    handle = replace(build("gpt2"))
    assert list(forms(handle)) == ["bare", "question"]
    show_examples(handle, {"tongue": [("A speaks", "{French}"), ("B speaks", "Dutch")]})
    assert list(forms(handle)) == ["bare", "question", "examples"]
    use(handle, forms(handle)["examples"])
    text, start, end = prompt_in_template(handle, Ask("C speaks", relation="tongue"))
    assert text == "A speaks {French}\nB speaks Dutch\nC speaks" and text[start:end] == "C speaks"
    assert prompt_in_template(handle, Ask("C speaks", relation="other"))[0] == "C speaks"
    ids = [prompt_inputs(handle, Ask("C speaks", relation=r))["input_ids"].shape[1] for r in ("tongue", "other")]
    assert ids[0] > ids[1]


def test_a_chat_template_is_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = replace(build("gpt2"))
    monkeypatch.setattr(handle.tokenizer, "chat_template", CHAT)
    assert forms(handle)["chat"] == PromptForm("chat", "<u>{prompt}</u><a>", "{answer}")


def test_the_form_with_the_most_old_answers_is_chosen_and_the_simplest_of_equal_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = replace(build("gpt2"))
    own = handle.family

    def generate(self: ModelPredictor, asks: list[Ask], n: int) -> list[str]:
        return ["right it is" if self.handle.family.text.startswith("Question") else "wrong" for _ in asks]

    monkeypatch.setattr(ModelPredictor, "generate", generate)
    found = choose(handle, [(Ask("x"), "right")] * 50)
    assert (found.form.name, found.shares) == ("question", {"bare": 0.0, "question": 1.0})
    assert choose(handle, [(Ask("x"), "absent")]).form.name == "bare"
    assert handle.family is own


def records(root: Path) -> Path:
    rows = [{"prompt": f"What is thing {i}?", "target": f"new {i % 7}", "previous": f"old {i % 5}"} for i in range(60)]
    (root / "facts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root


def test_a_run_says_its_form_and_goes_on_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {
        "stream": "jsonl:facts.jsonl",
        "data_root": records(tmp_path),
        "device": "cpu",
        "edits": 3,
        "editor": ("noop",),
    }
    config = RunConfig(**values, model=str(folder("gpt2")), probe_budget=40, max_new_tokens=2, out=tmp_path / "run")
    runner.study(replace(config, prompt="question"))
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["prompt"] == {"form": "question", "text": "Question: {prompt}\nAnswer:", "answer": " {answer}", "shares": {}}
    monkeypatch.setattr(runner, "choose", None)  # it would be called for another choice
    again = runner.prepare(stored_config(tmp_path / "run").resolve())
    assert again.handle.family.text.startswith("Question") and again.manifest["prompt"] == manifest["prompt"]
    with pytest.raises(
        BadConfig, match=r"--prompt chat cannot be had for .*: its tokenizer has no chat template; there are bare, question"
    ):
        runner.prepare(replace(config, prompt="chat").resolve())


def test_a_family_with_a_template_keeps_it() -> None:
    tiny = RunConfig(edits=1, editor=("noop",), device="cpu")
    assert "USER" in runner.prepare(tiny.resolve()).handle.family.text
    with pytest.raises(BadConfig, match="is asked in its family's own form"):
        runner.prepare(replace(tiny, prompt="question").resolve())
