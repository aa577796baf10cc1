"""`testbed.study` and the run that it returns: records, summary, figures, questions, and what a notebook shows."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest

import testbed
from analysis.figures import catalogue
from testbed.api.finished_run import FinishedRun, study
from testbed.experiment import runner
from testbed.experiment.config import BadConfig, RunConfig
from testbed.storage.files import StoreError
from tests.helpers.small_run import EDITS, small_run

EDITORS = ["noop", "finetune", "balancedit"]


@cache
def finished() -> FinishedRun:
    """The small run with its summary, in the folder where it was made."""
    with patch.object(catalogue, "draw_all", lambda context: {}):
        runner.finish(small_run())
    return FinishedRun(small_run(), device="cpu")


def test_records_hold_every_stored_answer_with_its_editor_and_its_question() -> None:
    run = finished()
    stored = {e: sum(len(pd.read_parquet(p)) for p in (run.folder / e / "records").glob("*.parquet")) for e in EDITORS}
    assert run.records.groupby("editor").size().to_dict() == stored
    assert list(run.records.columns[:3]) == ["editor", "prompt", "answer"]
    texts = pd.read_parquet(run.folder / "questions.parquet").set_index("prompt")["answer"]
    for prompt, answer in run.records[["prompt", "answer"]].drop_duplicates().itertuples(index=False):
        assert answer in set(texts.loc[[prompt]]) or pd.isna(answer)
    own = run.records[(run.records["editor"] == "balancedit") & (run.records["split"] == "edit")]
    assert set(run.edits["prompt"]) <= set(own["prompt"])


def test_summary_table_and_edits_are_those_of_the_folder() -> None:
    run = finished()
    assert run.summary == json.loads((run.folder / "summary.json").read_text("utf-8"))
    assert run.editors == EDITORS == list(run.table.index)
    name = "edit_success_gen" if "edit_success_gen" in run.table else "edit_success"
    for editor in EDITORS:
        assert run.table.loc[editor, name] == pytest.approx(run.summary["editors"][editor][name]["value"])
    assert len(run.edits) == EDITS


def test_a_figure_is_drawn_by_its_name_or_the_names_are_told() -> None:
    figure = finished().figure("retention")
    assert figure.axes
    with pytest.raises(BadConfig, match=r"there is no figure 'retenshun'; there are retention, "):
        finished().figure("retenshun")
    with pytest.raises(BadConfig, match="lacks the measurements of the figure 'safety'"):
        finished().figure("safety")


def test_questions_are_put_to_the_edited_model_as_it_was_at_any_step() -> None:
    run = finished()
    prompt = run.edits["prompt"].iloc[0]
    last, first = run.ask(prompt, editor="balancedit"), run.ask(prompt, "balancedit", as_of=0)
    assert (last.step, first.step) == (EDITS, 0)
    assert first.answer == first.unedited == last.unedited
    assert [f.event.prompt for f in last.fired or () if f.event] == [prompt] and first.fired == ()
    with patch("testbed.api.finished_run.rebuild", side_effect=AssertionError("the model is loaded once")):
        run.ask(prompt, editor="noop")
    with pytest.raises(BadConfig, match="--editor must say which of"):
        run.ask(prompt)


def test_a_notebook_shows_the_main_metrics_as_the_report_words_them() -> None:
    html, text = finished()._repr_html_(), repr(finished())
    for word in (*EDITORS, "report.html", f"{EDITS} edits of jsonl:facts.jsonl"):
        assert word in html
    assert html.count("<tr>") == 1 + len(finished().table.columns)
    assert "balancedit" in text and f"{EDITS} edits" in text


def test_what_a_run_is_called_is_escaped(tmp_path: Path) -> None:
    shutil.copytree(finished().folder, tmp_path / "a<b>")
    assert "a&lt;b&gt;" in FinishedRun(tmp_path / "a<b>")._repr_html_()


def test_a_folder_without_a_summary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"holds no summary.json: it is no finished run; python -m analysis"):
        FinishedRun(tmp_path)


def test_study_returns_the_run_of_its_folder() -> None:
    said: list[str] = []

    def done(config: Any, say: Any) -> dict[str, Any]:
        say("a note")
        return {"run": {"folder": str(finished().folder)}}

    with patch.object(runner, "study", done):
        run = study(RunConfig(), said.append)
    assert run.folder == small_run() and said == ["a note"]
    assert testbed.study is study and testbed.FinishedRun is FinishedRun
