"""Reading `extras` of answers by key, without the rows and files that lack it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.reading.records import BadRun, answers_with, part_files


def write(folder: Path, name: int, steps: list[int], extras: list[Any], **options: Any) -> None:
    (folder / "records").mkdir(parents=True, exist_ok=True)
    ids = [f"{name}-{i}" for i in range(len(steps))]
    shown = [None if x is None else json.dumps(x) for x in extras]
    table = pa.table({"question_id": ids, "probe_step": steps, "extras": pa.array(shown, pa.string())})
    pq.write_table(table, folder / "records" / f"step-{name:06d}.parquet", **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, 2, [1, 1, 2, 2], [{}, {"entry": None}, {"first_ids": [1], "entry": "a"}, None])
    write(tmp_path, 3, [3, 3], [{"note": "entry"}, {"note": '"entry": null'}])
    write(tmp_path, 4, [4, 4, 4], [{"entry": "b"}, {}, {"entry": "c"}], row_group_size=1)
    return tmp_path


def test_answers_that_have_the_key_are_found_in_every_file(folder: Path) -> None:
    result = answers_with(folder, "entry", ("question_id",))
    assert result["question_id"].tolist() == ["2-1", "2-2", "4-0", "4-2"]
    extras = [json.loads(x) for x in result["extras"]]
    assert extras == [{"entry": None}, {"first_ids": [1], "entry": "a"}, {"entry": "b"}, {"entry": "c"}]


def test_only_the_steps_asked_for(folder: Path) -> None:
    assert answers_with(folder, "entry", ("question_id",), [2, 3])["question_id"].tolist() == ["2-2"]
    assert list(answers_with(folder, "nowhere", ("question_id",), [2]).columns) == ["question_id", "extras"]


def test_a_file_is_left_out_only_where_its_footer_rules_it_out(folder: Path) -> None:
    write(folder, 5, [5], [{}], write_statistics=False)
    assert [p.name for p in part_files(folder, [2])] == ["step-000002.parquet", "step-000005.parquet"]
    assert len(part_files(folder)) == 4


def test_a_file_without_the_column_is_told(folder: Path) -> None:
    pq.write_table(pa.table({"probe_step": [6]}), folder / "records" / "step-000006.parquet")
    with pytest.raises(BadRun, match="lacks the columns extras"):
        answers_with(folder, "entry", ("question_id",))
