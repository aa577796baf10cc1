"""`--save-model`: an edited model that anyone loads with transformers, and a reason where there is none to save."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from testbed.experiment.saved_models import chat_template
from testbed.model.loading import load
from testbed.model.prompt_forms import PromptForm, use
from testbed.storage.run_folder import RunFolder
from tests.helpers.models import folder
from tests.helpers.warm_process import Done, command

NAMES = ("memit", "memit[history=true]", "finetune", "noop", "balancedit")
SAVED = {"memit": "memit", "memit[history=true]": "memit-history=true", "finetune": "finetune"}

LOAD = """
import json, sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("Who leads the old bridge?", return_tensors="pt")["input_ids"]
with torch.no_grad():
    logits = model(input_ids=ids).logits[0, -1].double()
print(json.dumps({"logits": logits.tolist(), "foreign": sorted(m for m in sys.modules if m.split(".")[0] in ("testbed", "streams"))}))
"""


@cache
def run() -> tuple[Done, Path]:
    out = Path(mkdtemp(prefix="save-"))
    small = ("--edits", 3, "--max-new-tokens", 2, "--probe-budget", 10, "--device", "cpu")
    fast = ("--set", "memit.steps=3", "--set", "memit.contexts=0", "--set", "finetune.steps=2")
    where = ("--stream", "world-yearly", "--model", folder("gpt2"), "--out", out / "run", "--save-model", out / "models")
    return command(*where, "--editor", ",".join(NAMES), *small, *fast, figures=False), out


def in_a_fresh_process(path: Path) -> dict:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", LOAD, str(path)], cwd=path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_editors_without_weights_of_their_own_say_so() -> None:
    done, out = run()
    assert done.code == 0, done.err
    for name in ("noop", "balancedit"):
        assert f"{name} changes no weights of the model, so there is no edited model to save" in " ".join(done.err.split())
    assert {p.name for p in (out / "models").iterdir()} == set(SAVED.values())


@pytest.mark.parametrize("name", list(SAVED))
def test_an_edited_model_is_loaded_by_plain_transformers(name: str) -> None:
    _, out = run()
    place = out / "models" / SAVED[name]
    tensors, base = load_file(place / "model.safetensors"), load_file(folder("gpt2") / "model.safetensors")
    changed = [n for n in base if not torch.equal(base[n], tensors[n])]
    assert len(changed) == 1
    assert "c_proj" in changed[0]
    state = RunFolder(out / "run").editor(name).newest()[1]
    if "weight" in state:
        assert torch.equal(tensors[changed[0]], state["weight"])
    else:
        made = (state["left.0"].T @ state["right.0"]).T
        torch.testing.assert_close(tensors[changed[0]] - base[changed[0]], made, rtol=1e-3, atol=1e-5)


@pytest.mark.ci
def test_it_needs_nothing_of_the_testbed_and_answers_differently() -> None:
    _, out = run()
    edited, base = in_a_fresh_process(out / "models" / "memit"), in_a_fresh_process(folder("gpt2"))
    assert edited["foreign"] == []
    assert max(abs(a - b) for a, b in zip(edited["logits"], base["logits"])) > 1e-3


@cache
def picture_run() -> Path:
    out = Path(mkdtemp(prefix="save-"))
    small = ("--edits", 2, "--max-new-tokens", 2, "--probe-budget", 10, "--device", "cpu", "--set", "finetune.steps=2")
    where = ("--stream", "okedit-yearly", "--model", folder("llava"), "--out", out / "run", "--save-model", out / "models")
    done = command(*where, "--editor", "finetune", *small, figures=False)
    assert done.code == 0, done.err
    return out


@pytest.mark.ci
@pytest.mark.parametrize("name", ["text", "picture"])
def test_the_card_shows_how_to_ask_an_edited_question(name: str) -> None:
    """Its code runs as it stands in the folder, without the testbed, and prints the answer that the card names."""
    out, editor = (run()[1], "memit") if name == "text" else (picture_run(), "finetune")
    place = out / "models" / editor
    card = (place / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    (answer,) = re.findall(r"this model answers `(.*)`:", card)
    assert ("edited-question.png" in card) == (place / "edited-question.png").is_file() == (name == "picture")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=place, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == answer
    table = pq.read_table(out / "run" / "events.parquet").to_pylist()
    assert any(e["target"] in card and e["prompt"] in card for e in table)


@pytest.mark.parametrize("text", ["{prompt}", "Question: {prompt}\nAnswer:", "say {{'it'}} \"{prompt}\""])
def test_the_chat_template_is_the_form_of_the_prompts(text: str) -> None:
    handle = load(str(folder("gpt2")))
    use(handle, PromptForm("own", text))
    handle.tokenizer.chat_template = chat_template(handle)
    message = [{"role": "user", "content": "Who leads {x}?"}]
    assert handle.tokenizer.apply_chat_template(message, tokenize=False) == text.format(prompt="Who leads {x}?")


def test_examples_of_a_relation_have_no_chat_template() -> None:
    handle = load(str(folder("gpt2")))
    use(handle, PromptForm("examples", "{examples}{prompt}"))
    assert chat_template(handle) is None
