"""Protocols: what they give to a run, what the manifest and the screen say, and a real run that prints both."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pytest
from rich.console import Console

from analysis.metrics.catalogue import metric_of
from analysis.metrics.summary import summarise
from analysis.reading.load import load_run
from analysis.reporting.tables import protocol_tables
from testbed import run
from testbed.core.registry import PROBES
from testbed.experiment import runner
from testbed.experiment.config import BadConfig, RunConfig
from testbed.experiment.protocols import PROTOCOLS, ProtocolName, defaults_of, departures, probes_of, prompt_of
from testbed.model.prompt_forms import OWN_FORM
from testbed.probes.qa_prompt import TEMPLATE
from tests.helpers.models import build, folder

BOTH: tuple[ProtocolName, ...] = ("published", "wild")


def test_every_preset_names_probes_metrics_and_fields_that_exist() -> None:
    assert set(PROTOCOLS) == set(typing.get_args(ProtocolName)) == set(BOTH)
    for protocol in PROTOCOLS.values():
        assert all(not PROBES.get(name).default for name in protocol.also)
        assert all(metric_of(name) for name in protocol.metrics)
        assert RunConfig(prompt=protocol.prompt, **protocol.defaults)


def test_the_command_line_wins_over_a_protocol_and_a_protocol_over_the_defaults(tmp_path: Path) -> None:
    assert run.parse(["--protocol", "published"]).batch == 100
    assert run.parse(["--protocol", "published,wild", "--batch", "1"]).batch == 1
    assert run.parse(["--protocol", "wild"]).batch == 1
    (tmp_path / "run.yaml").write_text("protocol: published\nedits: 7\n")
    config = run.parse(["--config", str(tmp_path / "run.yaml")])
    assert (config.batch, config.edits, config.protocol) == (100, 7, ("published",))
    with pytest.raises(BadConfig, match="expected one of published, wild"):
        RunConfig(protocol="tame")


def test_a_protocol_is_resolved_to_its_prompt_and_probes() -> None:
    resolved = RunConfig("countries-yearly", ("noop",), protocol=BOTH).resolve()
    assert resolved.config.prompt == prompt_of(BOTH) == "bare"
    assert set(resolved.schedule_config().asked.also) == set(probes_of(BOTH)) == {"generation", "qa-prompt"}
    assert RunConfig("countries-yearly", ("noop",), protocol="wild", prompt="chat").resolve().config.prompt == "chat"


def test_a_model_of_pictures_keeps_its_form_and_a_form_that_is_asked_for_is_not_dropped() -> None:
    handle = build("llava")
    resolved = RunConfig("countries-yearly", ("noop",), protocol="wild").resolve()
    assert runner.ask_in_form(resolved, resolved.stream.create(), 0, handle).form.name == OWN_FORM
    assert f"--prompt {OWN_FORM} departs from the protocol wild (bare)" in departures(["wild"], {"prompt": OWN_FORM})
    asked = RunConfig("countries-yearly", ("noop",), protocol="wild", prompt="chat").resolve()
    with pytest.raises(BadConfig, match=r"--prompt chat: .* reads pictures"):
        runner.ask_in_form(asked, asked.stream.create(), 0, handle)


def test_a_run_without_a_protocol_is_as_before() -> None:
    plain = RunConfig("countries-yearly", ("noop",))
    assert "protocol" not in plain.stored() and plain.resolve().config == plain
    assert not plain.resolve().schedule_config().asked.also
    assert defaults_of([]) == {} and prompt_of([]) is None


def test_departures_are_named() -> None:
    assert departures(["published"], {"batch": 100, "prompt": "bare"}) == []
    assert departures(["published"], {"batch": 1, "prompt": "chat"}) == [
        "--prompt chat departs from the protocol published (bare)",
        "--batch 1 departs from the protocol published (100)",
    ]


@pytest.mark.ci
def test_one_run_prints_both_tables_with_its_texts_behind_them(tmp_path: Path) -> None:
    facts = ({"prompt": f"Who owns the ship {i}?", "target": f"Ann {i}", "previous": f"Bob {i}", "relation": "owner"} for i in range(20))
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(f) + "\n" for f in facts))
    words = f"--stream jsonl:facts.jsonl --data-root {tmp_path} --model {folder('gpt2')} --editor noop,finetune --device cpu --edits 4"
    out = tmp_path / "run"
    config = run.parse(
        [*words.split(), *f"--max-new-tokens 2 --protocol published,wild --batch 2 --out {out}".split(), "--set", "finetune.steps=2"]
    )
    with patch.object(runner, "finish", lambda out: {}):  # no figures, because the test reads numbers alone
        runner.study(config)
    summary = summarise(load_run(out), replicates=20)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["protocols"]["wild"]["source"] == PROTOCOLS["wild"].source
    assert manifest["config"]["protocol"] == list(BOTH) and manifest["prompt"]["form"] == "bare"
    notes = "\n".join(manifest["notes"])
    assert "--batch 2 departs from the protocol published (100)" in notes
    assert "edits have no generation prompts in their records: the edit's own prompt and its paraphrases stand in" in notes
    assert "reference_score is absent: no attribute_snippets.json" in "\n".join(summary["run"]["notes"])
    for editor in ("noop", "finetune"):
        assert {"generation_entropy", "qa_success", "qa_success_gen", "edit_success_gen"} <= set(summary["editors"][editor])
    console = Console(width=160, record=True, file=(tmp_path / "screen").open("w"))
    for table in protocol_tables(summary):
        console.print(table)
    shown = console.export_text()
    assert "published: as published" in shown and "wild: WILD" in shown
    assert "Fluency" in shown and "Success, QA prompt, free generation" in shown
    _check_texts(out)


def _check_texts(out: Path) -> None:
    """Sampled texts are stored, are no verdicts, and are the unedited model's own where nothing was edited."""
    asked = pd.read_parquet(out / "questions.parquet").set_index("question_id")
    rows = pd.concat(pd.read_parquet(p) for p in sorted((out / "noop" / "records").glob("*.parquet")))
    drawn = rows[rows["split"] == "generation"]
    assert len(drawn) and drawn["exact"].isna().all() and drawn["n_tokens"].isna().all()
    assert (drawn["generated"] == drawn["base_answer"]).all() and drawn["generated"].str.len().min() > 20
    assert (asked["scoring"][drawn["question_id"]] == "sample").all()
    behind = asked[asked["split"] == "qa_edit"]["prompt"]
    assert len(behind) and behind.str.startswith(TEMPLATE[:20]).all()
