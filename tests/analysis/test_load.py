"""Reading run folders: frames of numbers, notes, and messages about folders that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.metrics.orders import load_orders
from analysis.reading.load import load_run, texts
from analysis.reading.records import BadRun
from tests.helpers.fake_run import Plan, event, fake_run, question, record, write_run


def tiny(out: Path, rows: list[dict] | None = None, **manifest: object) -> Path:
    events = [event(0, 1, subject="Ann"), event(1, 2, subject="Ann"), event(2, 3, subject=None)]
    questions = [question(f"e{i}-edit", f"e{i}") for i in range(3)] + [question("g0", None, "general")]
    some = [record(question_id="e0-edit", edit_id="e0", probe_step=3, token_hits=1, n_tokens=2, logprob=-1.0, exact=True, generated="yes")]
    return write_run(out, events, questions, {"e": some if rows is None else rows}, **manifest)


def edit_manifest(out: Path, **changes: object) -> None:
    path = out / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_scores_ages_and_clusters(tmp_path: Path) -> None:
    run = load_run(tiny(tmp_path))
    row = run.editors["e"].records.iloc[0]
    assert (row["tf"], row["tf_exact"], row["gen"], row["age"], row["live"]) == (0.5, 0.0, 1.0, 2, True)
    assert run.questions["cluster"].tolist() == [0, 0, 1, 2]
    assert run.clusters == 3


def test_what_was_not_measured_is_nan_not_zero(tmp_path: Path) -> None:
    rows = [record(question_id="e0-edit", edit_id="e0", probe_step=3), record(question_id="g0", probe_step=3, n_tokens=0, token_hits=0)]
    got = load_run(tiny(tmp_path, rows)).editors["e"].records
    assert got[["tf", "tf_exact", "gen", "logprob"]].isna().all(axis=None)


def test_floats_with_nan_of_old_files_are_read(tmp_path: Path) -> None:
    out = tiny(tmp_path)
    part = next((out / "e" / "records").glob("*.parquet"))
    table = pq.read_table(part)
    for name in ("token_hits", "n_tokens", "exact"):
        table = table.set_column(table.column_names.index(name), name, pa.array([float("nan")]))
    pq.write_table(table, part)
    got = load_run(out).editors["e"].records
    assert got[["tf", "gen"]].isna().all(axis=None)


def test_files_that_hold_many_steps_are_read_alike(tmp_path: Path) -> None:
    out = fake_run(tmp_path, Plan(edits=12, years=2, editors=("balancedit",)))
    before = load_run(out).editors["balancedit"].records
    parts = sorted((out / "balancedit" / "records").glob("*.parquet"))
    whole = pa.concat_tables([pq.read_table(p) for p in parts])
    for p in parts[1:]:
        p.unlink()
    pq.write_table(whole, parts[0])
    pd.testing.assert_frame_equal(load_run(out).editors["balancedit"].records, before)


def test_an_answer_stored_twice_counts_once_and_is_noted(tmp_path: Path) -> None:
    row = record(question_id="e0-edit", edit_id="e0", probe_step=3, token_hits=1, n_tokens=2)
    run = load_run(tiny(tmp_path, [row, row]))
    assert len(run.editors["e"].records) == 1
    assert run.notes == ["e: 1 answers were stored twice; one of each was kept"]


def test_a_run_cut_short_is_read_with_a_note(tmp_path: Path) -> None:
    out = fake_run(tmp_path, Plan(edits=12, years=2, editors=("noop",), stop=8))
    assert "noop: cut short at step 8 of 12; its numbers are of that moment" in load_run(out).notes


def test_an_editor_without_records_is_left_out_with_a_note(tmp_path: Path) -> None:
    out = tiny(tmp_path)
    edit_manifest(out, editors=["e", "later"])
    run = load_run(out)
    assert list(run.editors) == ["e"]
    assert "later: no records yet, left out" in run.notes


def test_a_folder_of_schema_version_1_is_read_and_its_answers_judged_again(tmp_path: Path) -> None:
    """Version 1 has no choices, no scoring and no extras of the unedited model."""
    out = fake_run(tmp_path, Plan(edits=12, years=2, editors=("balancedit",)), schema_version=1, grading_version=1)
    for path, absent in ((out / "questions.parquet", ["choices", "scoring"]), (out / "base" / "answers.parquet", ["extras"])):
        pq.write_table(pq.read_table(path).drop_columns(absent), path)
    records = load_run(out).editors["balancedit"].records
    right = records[(records["split"] == "edit") & records["gen"].notna()]
    assert set(right["gen"]) == {0.0, 1.0}
    assert (right["begins"] >= right["gen"]).all()


def broken_manifest(out: Path) -> None:
    (out / "manifest.json").write_text('{"run": ')


def no_manifest(out: Path) -> None:
    (out / "manifest.json").unlink()


def other_version(out: Path) -> None:
    edit_manifest(out, schema_version=99)


def no_records(out: Path) -> None:
    for part in (out / "e" / "records").glob("*.parquet"):
        part.unlink()


def lacking_column(out: Path) -> None:
    part = next((out / "e" / "records").glob("*.parquet"))
    pq.write_table(pq.read_table(part).drop_columns(["incl_prob"]), part)


def half_a_file(out: Path) -> None:
    part = next((out / "e" / "records").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:100])


def no_base(out: Path) -> None:
    (out / "base" / "answers.parquet").unlink()


def no_events(out: Path) -> None:
    path = out / "events.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)


def foreign_questions(out: Path) -> None:
    path = out / "questions.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)


def bad_weight(out: Path) -> None:
    part = next((out / "e" / "records").glob("*.parquet"))
    table = pq.read_table(part)
    pq.write_table(table.set_column(table.column_names.index("incl_prob"), "incl_prob", pa.array([0.0])), part)


def bad_report(out: Path) -> None:
    (out / "e" / "edits.jsonl").write_text('{"step": 1\n{"step": 2}\n')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_manifest, "is not a run folder"),
        (broken_manifest, "is not JSON"),
        (other_version, "schema version 99, this analysis reads "),
        (no_records, "no editor has records yet"),
        (lacking_column, "lacks the columns incl_prob"),
        (half_a_file, "cannot be read"),
        (no_base, "answers.parquet is missing"),
        (no_events, "the run is empty"),
        (foreign_questions, "questions that questions.parquet lacks"),
        (bad_weight, "inclusion probability outside"),
        (bad_report, "line 1 is damaged"),
    ],
)
def test_errors_name_the_file_and_what_to_do(tmp_path: Path, damage, words: str) -> None:
    out = tiny(tmp_path)
    damage(out)
    with pytest.raises(BadRun, match=words):
        load_run(out)


def test_a_report_line_cut_at_the_end_is_left_out(tmp_path: Path) -> None:
    out = tiny(tmp_path)
    path = out / "e" / "edits.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "event')
    assert load_run(out).editors["e"].reports["step"].tolist() == [1, 2, 3]


def test_runs_of_one_schedule_stand_side_by_side(tmp_path: Path) -> None:
    a, b = tiny(tmp_path / "a"), tiny(tmp_path / "b")
    (both,), (one,) = load_orders([a, b]), load_orders([a])
    assert list(both.editors) == ["e (a)", "e (b)"]
    assert list(one.editors) == ["e"]


def test_runs_of_different_schedules_are_refused_with_the_difference(tmp_path: Path) -> None:
    a, b = tiny(tmp_path / "a", years=1), tiny(tmp_path / "b", years=2, schedule_hash="other")
    with pytest.raises(BadRun, match=r"different schedules.*schedule_hash: \"s\" / \"other\"; years: 1 / 2"):
        load_orders([a, b])
    with pytest.raises(BadRun, match="name at least one"):
        load_orders([])


def test_texts_of_a_few_answers(tmp_path: Path) -> None:
    run = load_run(tiny(tmp_path))
    result = texts(run.editors["e"], ["e0-edit"], [3])
    assert result["generated"].tolist() == ["yes"]
    assert texts(run.editors["e"], ["e0-edit"], [2]).empty


def test_age_counts_edits_not_steps(tmp_path: Path) -> None:
    events = [event(i, 1 + i // 3) for i in range(9)]
    questions = [question(f"e{i}-edit", f"e{i}") for i in range(9)]
    rows = [record(question_id=f"e{i}-edit", edit_id=f"e{i}", probe_step=3) for i in range(9)]
    run = load_run(write_run(tmp_path, events, questions, {"e": rows}))
    assert run.editors["e"].records["age"].tolist() == [6, 6, 6, 3, 3, 3, 0, 0, 0]
    assert run.edits_at(np.array([0, 1, 3])).tolist() == [0, 3, 9]
