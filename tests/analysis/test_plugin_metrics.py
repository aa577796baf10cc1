"""Metrics of a plug-in: in summary, tables and report, with intervals and pairs, and no harm where they fail."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.metrics.answers import at_end, in_common
from analysis.metrics.catalogue import metric_of, split_name
from analysis.metrics.plugin import AnswerMetric, generated_texts
from analysis.metrics.summary import summarise
from analysis.reading.load import EditorRun, Run, load_run
from analysis.reading.records import SCORES
from analysis.reporting.report import write_all
from testbed.__main__ import main
from testbed.core.registry import METRICS
from tests.helpers.fake_run import Plan, fake_run

TEMPLATE = Path(__file__).parents[2] / "docs" / "templates" / "metric.py"
PLAN = Plan(edits=24, years=2, panel=8, editors=("noop", "finetune"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("run"), PLAN)


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("analysis.reporting.report.catalogue.draw_all", lambda context: {})


@pytest.fixture(autouse=True)
def _forget_what_a_test_registers() -> Iterator[None]:
    before = dict(METRICS._entries)
    yield
    METRICS._entries.clear()
    METRICS._entries.update(before)


class Doubled(AnswerMetric):
    """The edit success, said again, in all scoring modes."""

    summary, short, better, modes, main = "Edit success, said again", "Again", 1, True, True

    def answers(self, run: Run, editor: EditorRun) -> pd.DataFrame:
        return at_end(editor.records, "edit")

    def values(self, run: Run, editor: EditorRun, rows: pd.DataFrame) -> np.ndarray:
        return rows[SCORES].to_numpy()


def test_a_metric_gets_the_intervals_and_pairs_of_the_testbeds_own(folder: Path) -> None:
    METRICS.register("again")(Doubled)
    summary = summarise(load_run(folder), replicates=100)
    for entries in (*summary["editors"].values(), *summary["pairs"].values()):
        own = {n.replace("again", "edit_success"): e for n, e in entries.items() if split_name(n)[0] == "again"}
        assert own == {n: e for n, e in entries.items() if split_name(n)[0] == "edit_success"}
        assert len(own) > 2
    assert metric_of("again_gen").short == "Again"


def test_the_template_is_in_summary_tables_and_report_of_a_run_that_is_analysed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    out = fake_run(tmp_path / "run", PLAN)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"config": {"plugin": ["words.py", "other.py"]}}))
    (tmp_path / "words.py").write_text(TEMPLATE.read_text())
    command = ["analyze", "run", "--replicates", "50", "--format", "png"]
    assert main(command) == 0 and "words.py" in capsys.readouterr().err  # nothing is loaded unasked
    assert "answer_words" not in json.loads((out / "summary.json").read_text())["editors"]["finetune"]
    assert main([*command, "--plugin", "words.py"]) == 0
    assert "the run had the plug-ins other.py: for metrics that they register, give them with --plugin" in capsys.readouterr().err
    words = json.loads((out / "summary.json").read_text())["editors"]["finetune"]["answer_words"]
    run = load_run(out)
    rows = at_end(run.editors["finetune"].records, "edit")
    counts = [len(t.split()) for t in generated_texts(run.editors["finetune"], rows) if t is not None]
    assert words["value"] == pytest.approx(np.average(counts, weights=rows["weight"])) and words["n"] == len(rows)
    assert "answer_words" in set(pd.read_csv(out / "tables" / "metrics.csv")["metric"])
    assert "Words of a free answer to an edited question" in (out / "report.html").read_text()


def test_texts_belong_to_their_rows_in_any_order(folder: Path) -> None:
    run = load_run(folder)
    editor = run.editors["finetune"]
    rows = editor.records[editor.records["split"] == "edit"]
    texts = dict(zip(rows.index, generated_texts(editor, rows)))
    assert len(set(texts.values())) > 5
    shuffled = rows.sample(frac=0.5, random_state=1)
    assert generated_texts(editor, shuffled) == [texts[i] for i in shuffled.index]
    cut = editor.records.iloc[::2].reset_index(drop=True)
    ours, _ = in_common(editor.records, cut)
    own = ours[ours["split"] == "edit"]
    assert generated_texts(editor, own) == [texts[i] for i in own.index]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (lambda rows: np.full(len(rows), 40.0), "values of the unit share lie in"),
        (lambda rows: np.zeros(len(rows) + 1), r"must return shape \(\d+,\) for \d+ answers"),
        (lambda rows: {}["nothing"], "KeyError: 'nothing'"),
    ],
)
def test_a_metric_that_fails_is_left_out_with_a_note_and_the_report_is_written(values, reason: str, tmp_path: Path) -> None:
    class Broken(Doubled):
        modes = False

        def values(self, run: Run, editor: EditorRun, rows: pd.DataFrame) -> np.ndarray:
            return values(rows)

    METRICS.register("broken")(Broken)
    summary = write_all([fake_run(tmp_path / "run", PLAN)], formats=("png",), replicates=50)
    notes = [n for n in summary["run"]["notes"] if "the metric broken failed" in n]
    assert len(notes) == 1 and notes[0].startswith("noop, finetune: ")
    assert re.search(reason, notes[0])
    assert "broken" not in summary["editors"]["noop"] and "edit_success" in summary["editors"]["noop"]
    assert "the metric broken failed" in (tmp_path / "run" / "report.html").read_text()


def test_a_metric_without_answers_has_no_value(folder: Path) -> None:
    class Nothing(Doubled):
        def answers(self, run: Run, editor: EditorRun) -> pd.DataFrame:
            return editor.records.iloc[:0]

    METRICS.register("nothing")(Nothing)
    run = load_run(folder)
    assert not [n for n in summarise(replace(run, notes=[]), replicates=50)["editors"]["noop"] if n.startswith("nothing")]


def test_a_name_of_the_testbed_is_refused() -> None:
    with pytest.raises(ValueError, match="'edit_success' cannot be registered: the testbed has a metric of this name"):
        METRICS.register("edit_success")(Doubled)
