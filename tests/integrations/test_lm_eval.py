"""Tasks of lm-evaluation-harness: the harness's own numbers for an unedited model, all editors of a run, and refused tasks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from testbed.core.registry import EDITORS
from testbed.experiment.config import BadConfig
from testbed.integrations import lm_eval as bridge
from testbed.integrations.lm_eval import HarnessConfig, harness, main, model
from testbed.model.predictor import ModelPredictor
from testbed.run import main as run
from tests.helpers.models import build, folder
from tests.helpers.small_run import EDITS, small_run

pytest.importorskip("lm_eval", reason="the extra [lm-eval] is not installed")

ROOT = Path(__file__).parents[2]
DOCS = [{"question": f"who stands beside the river {i}?", "answers": ["red", "the old bridge", "green"], "gold": i % 3} for i in range(12)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three local tasks: choices, one continuation, a generation. Nothing is fetched."""
    root = tmp_path_factory.mktemp("tasks")
    (root / "docs.jsonl").write_text("".join(json.dumps(d) + "\n" for d in DOCS), encoding="utf-8")
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(root / "docs.jsonl")}, "cache_dir": str(root / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": " ",
    }
    kinds: dict[str, dict[str, Any]] = {
        "bridge_choice": {"output_type": "multiple_choice", "doc_to_choice": "{{answers}}", "doc_to_target": "gold",
                          "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]},
        "bridge_next": {"output_type": "loglikelihood", "doc_to_target": "{{' ' + answers[gold]}}",
                        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}]},
        "bridge_say": {"output_type": "generate_until", "doc_to_target": "{{answers[gold]}}", "metric_list": [{"metric": "exact_match"}],
                       "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3}},
    }  # fmt: skip
    for name, more in kinds.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **more}), encoding="utf-8")
    before = {k: os.environ.get(k) for k in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE")}
    os.environ.update({"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"})
    yield root
    for k, v in before.items():
        if v is None:
            os.environ.pop(k)
        else:
            os.environ[k] = v


@pytest.mark.ci
def test_the_unedited_model_has_the_numbers_that_the_harness_gives_it(tasks: Path) -> None:
    import lm_eval.tasks
    from lm_eval.models.huggingface import HFLM

    handle = build("gpt2")
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
    harness_model: Any = HFLM
    own = harness_model(pretrained=handle.model, tokenizer=handle.tokenizer, batch_size=4, device="cpu")
    for name, metrics in (("bridge_choice", {"acc,none", "acc_norm,none"}), ("bridge_next", {"acc,none", "perplexity,none"})):
        want, got = (bridge.evaluate(m, [name], manager, None, None)[name] for m in (own, model(ModelPredictor(handle), handle)))
        assert metrics <= set(want)
        for k, v in want.items():
            assert got[k] == pytest.approx(v, rel=1e-4), (name, k)


def test_every_editor_of_a_run_is_asked_the_same_items(tasks: Path) -> None:
    names = "bridge_choice,bridge_next,bridge_say"
    found = harness(HarnessConfig(small_run(), names, include=tasks, items=5, device="cpu"))
    assert list(found["results"]) == ["unedited", "noop", "finetune", "balancedit"]
    assert set(found["samples"]) == set(names.split(","))
    assert all(len(set(v)) == 5 and max(v) < len(DOCS) for v in found["samples"].values())
    results = found["results"]
    assert results["noop"] == results["unedited"]
    assert results["finetune"]["bridge_next"] != results["unedited"]["bridge_next"]
    stored = json.loads((small_run() / "lm_eval.json").read_text())
    assert stored["results"] == results
    assert stored["steps"] == dict.fromkeys(("noop", "finetune", "balancedit"), EDITS)


def request(*args: Any) -> Any:
    return SimpleNamespace(args=args)


def test_bare_contexts_rolling_texts_and_generations() -> None:
    handle = build("gpt2")
    predictor = ModelPredictor(handle)
    lm = model(predictor, handle)
    text = "the small lamp stands beside the river"
    whole = float(predictor.text_logprobs([text])[0].sum())
    assert lm.loglikelihood([request("", text)]) == [(pytest.approx(whole), False)]
    assert lm.loglikelihood_rolling([request(text)]) == [pytest.approx(whole)]
    asked = [request("who?", {"until": ["\n"], "max_gen_toks": n}) for n in (3, 1, 3)]
    said = lm.generate_until(asked)
    assert said[0] == said[2] == predictor.generate([bridge.Ask("who?")], 3)[0]
    assert said[1] == predictor.generate([bridge.Ask("who?")], 1)[0]
    first = said[0][0]
    assert lm.generate_until([request("who?", {"until": ["\n", first], "max_gen_toks": 3})]) == [""]
    assert lm.loglikelihood([]) == lm.generate_until([]) == []


def test_tasks_that_the_predictor_cannot_answer_exactly_are_refused() -> None:
    handle = build("gpt2")
    lm = model(ModelPredictor(handle), handle)
    with pytest.raises(BadConfig, match=r"ends generations at \['Q:'\]; here they end at a line's end"):
        lm.generate_until([request("who?", {"until": ["Q:"]})])
    with pytest.raises(BadConfig, match="samples its generations"):
        lm.generate_until([request("who?", {"until": ["\n"], "do_sample": True, "temperature": 0.7})])
    with pytest.raises(BadConfig, match=r"a rolling text has \d+ tokens, .* reads 256"):
        lm.loglikelihood_rolling([request("a red circle " * 200)])


@pytest.mark.ci
def test_an_editor_of_ones_own_file_is_measured(tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.reporting.report.catalogue.draw_all", lambda context: {})
    mine, out = tmp_path / "mine.py", tmp_path / "out"
    mine.write_text((ROOT / "docs" / "templates" / "editor.py").read_text("utf-8").replace('"sgd-edit"', '"edit-of-the-harness"'))
    words = ["--stream", "world-yearly", "--edits", "2", "--batch", "2", "--probe-budget", "20", "--model", str(folder("llava"))]
    try:
        assert run([*words, "--plugin", str(mine), "--editor", "noop,edit-of-the-harness", "--device", "cpu", "--out", str(out)]) == 0
        chosen = ["--tasks", "bridge_next", "--include", str(tasks), "--editor", "edit-of-the-harness", "--items", "2"]
        assert main([str(out), *chosen, "--device", "cpu"]) == 0
        assert "edit-of-the-harness" in json.loads((out / "lm_eval.json").read_text())["results"]
    finally:
        EDITORS._entries.pop("edit-of-the-harness", None)


def test_mistakes_of_the_user_are_named(tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([str(small_run())]) == 2
    assert "--tasks names no task" in capsys.readouterr().err
    assert main([str(small_run()), "--tasks", "no_such_task", "--include", str(tasks)]) == 2
    assert "lm-evaluation-harness has no task no_such_task" in capsys.readouterr().err
    assert main([str(small_run()), "--tasks", "bridge_next", "--include", str(tasks), "--editor", "memit", "--device", "cpu"]) == 2
    assert "has no editor 'memit'" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert main([str(small_run()), "--tasks", "x"]) == 2
    assert "pip install 'lifelong-editing-testbed[lm-eval]'" in capsys.readouterr().err.replace("\n", " ")
