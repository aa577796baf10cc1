"""The run folder: what is written comes back, and no cut loses what was finished."""

from __future__ import annotations

import errno
import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from testbed.core.checksums import read_lines
from testbed.core.schema import BaseAnswer, EditReport, EventRow, MonitorRow, QuestionRow, Record, ScheduleRow, columns
from testbed.storage import files
from testbed.storage.files import StoreError, read_json, read_state, write_json, write_rows, write_state
from testbed.storage.run_folder import EditorFolder, ExpectedContents, RunFolder, StepResults

few = settings(max_examples=12, deadline=None)
words = st.text(st.characters(exclude_categories=["Cs"]))
KINDS = {str: words, int: st.integers(-(2**63), 2**63 - 1), float: st.floats(allow_nan=False), bool: st.booleans(), list: st.lists(words)}


def rows_of(cls: type) -> st.SearchStrategy[Any]:
    """Any row of a dataclass, absent fields included."""
    fields = {name: KINDS[t] | st.none() if absent else KINDS[t] for name, (t, absent) in columns(cls).items()}
    return st.builds(cls, **fields)


def record(step: int, n: int = 0) -> Record:
    place = ("run", "finetune", 0, "e1", 1, 1.0, step, 1.5, "retention", 1, "edit", "", f"q{step}-{n}")
    return Record(*place, "a", "a", "b", 1, 2, -0.5, "a", True, "age_mixed", 0.25, 0.01, "{}")


def report(step: int) -> EditReport:
    return EditReport(step, (f"e{step}",), 0.1, 10, 20, 0.5, {}, {"x": "why"}, {"loss": 1.0 / 3})


def save(folder: EditorFolder, last: int, every: int = 2) -> None:
    """Steps 1 to `last`, saved every `every` steps as the loop does; the state counts the steps."""
    for at in range(every, last + 1, every):
        steps = range(at - every + 1, at + 1)
        folder.save(at, found(steps), {"weight": torch.full((3, 2), float(at)), "step": at})


def found(steps: Iterable[int]) -> StepResults:
    """What these steps bring: three answers and a report each, and monitors after even steps."""
    monitors = [MonitorRow(s, name, s / 3) for s in steps if s % 2 == 0 for name in ("entropy", "weight_norm")]
    return StepResults([record(s, n) for s in steps for n in range(3)], monitors, [report(s) for s in steps])


def whole(last: int) -> ExpectedContents:
    """What a folder holds after `last` steps of `found`."""
    return ExpectedContents([3] * last, frozenset(range(2, last + 1, 2)))


def content(folder: EditorFolder) -> tuple[list[dict[str, Any]], list[Any], float]:
    parts = sorted(p for name in ("records", "monitors") for p in (folder.path / name).glob("*"))
    rows = [r for p in parts for r in pq.read_table(p).to_pylist()]
    lines = read_lines(folder.path / "edits.jsonl")[0]
    return rows, lines, float(folder.newest()[1]["weight"][0, 0])


@pytest.mark.parametrize("cls", [Record, MonitorRow, BaseAnswer, QuestionRow, EventRow, ScheduleRow])
def test_any_row_comes_back_as_it_was(cls: type) -> None:
    @few
    @given(st.lists(rows_of(cls), max_size=4))
    def check(rows: list[Any]) -> None:
        with tempfile.TemporaryDirectory() as tmp:
            write_rows(Path(tmp) / "x.parquet", cls, rows)
            assert [cls(**r) for r in pq.read_table(Path(tmp) / "x.parquet").to_pylist()] == rows
            assert [p.name for p in Path(tmp).iterdir()] == ["x.parquet"]

    check()


@few
@given(
    st.dictionaries(words, words | st.integers() | st.lists(words), max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_any_state_comes_back_as_it_was(rest: dict[str, Any], dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype).T
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "step-000001.safetensors"
        write_state(path, {**rest, "weight of it": tensor})
        back = read_state(path)
    assert torch.equal(back.pop("weight of it"), tensor)
    assert back == {k: v for k, v in rest.items() if k != "weight of it"}


def test_tensors_that_share_memory_are_kept_apart(tmp_path: Path) -> None:
    base = torch.arange(4.0)
    write_state(tmp_path / "step-000001.safetensors", {"a": base, "b": base[:2]})
    back = read_state(tmp_path / "step-000001.safetensors")
    assert torch.equal(back["a"], base)
    assert torch.equal(back["b"], base[:2])


def test_a_saved_run_comes_back(tmp_path: Path) -> None:
    folder = EditorFolder(tmp_path)
    save(folder, 6)
    step, state = folder.resume()
    assert step == 6
    assert state is not None
    assert (state["step"], float(state["weight"][0, 0])) == (6, 6.0)
    rows, lines, _ = content(folder)
    answers = [asdict_row(record(s, n)) for s in range(1, 7) for n in range(3)]
    assert rows == [asdict_row(m) for m in found(range(1, 7)).monitors] + answers
    assert lines == [json.loads(json.dumps(asdict(report(s)))) for s in range(1, 7)]
    assert len(list((tmp_path / "state").iterdir())) == 1


def asdict_row(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in columns(type(row))}


def test_an_empty_folder_starts_at_the_beginning(tmp_path: Path) -> None:
    assert EditorFolder(tmp_path / "new").resume() == (0, None)
    with pytest.raises(StoreError, match="holds no saved state: the run stopped before its first save"):
        EditorFolder(tmp_path / "new").newest()[1]


@few
@given(st.data())
def test_any_file_cut_at_any_byte_and_the_run_made_again_is_whole(data: st.DataObject) -> None:
    """Cut one file anywhere, go on from where `resume` says, and everything is as if nothing had happened."""
    with tempfile.TemporaryDirectory() as tmp:
        complete, cut = EditorFolder(Path(tmp) / "whole"), EditorFolder(Path(tmp) / "cut")
        save(complete, 8)
        save(cut, 6)
        victim = data.draw(st.sampled_from(sorted(p for p in cut.path.rglob("*") if p.is_file())))
        raw = victim.read_bytes()
        if data.draw(st.booleans(), label="removed"):
            victim.unlink()
        else:
            victim.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1))])
        again(cut, 8)
        assert content(cut) == content(complete)


def again(folder: EditorFolder, last: int, every: int = 2) -> int:
    """Resume and make the rest; the step it went on from."""
    done, state = folder.resume(whole(last))
    assert done % every == 0
    assert (state is None) == (done == 0)
    for at in range(done + every, last + 1, every):
        folder.save(at, found(range(at - every + 1, at + 1)), {"weight": torch.full((3, 2), float(at)), "step": at})
    return done


class Killed(BaseException):
    """Stands for the process ending here."""


@pytest.mark.parametrize("at", range(1, 7))
@pytest.mark.parametrize("last", [2, 6])
def test_stopped_at_any_phase_of_a_save_nothing_finished_is_lost(tmp_path: Path, at: int, last: int) -> None:
    """Phases of one save: write and rename of records, monitors, then the state. A last line of the reports is there or not."""
    complete, cut = EditorFolder(tmp_path / "whole"), EditorFolder(tmp_path / "cut")
    save(complete, 8)
    save(cut, last - 2)
    calls: list[str] = []

    def phase(name: str, step: int) -> None:
        calls.append(name)
        if len(calls) == at:
            raise Killed

    stopped = EditorFolder(cut.path, phase)
    with pytest.raises(Killed):
        stopped.save(last, found((last - 1, last)), {"weight": torch.zeros(3, 2)})
    assert calls == (["write", "rename"] * 3)[:at]
    assert again(cut, 8) == last - 2
    assert content(cut) == content(complete)
    assert not list(cut.path.rglob(".*"))


@pytest.mark.parametrize("lost", ["records/step-000002.parquet", "monitors/step-000004.parquet"])
def test_a_file_that_is_gone_is_noticed_where_it_is_expected(tmp_path: Path, lost: str) -> None:
    folder = EditorFolder(tmp_path)
    save(folder, 4)
    (tmp_path / lost).unlink()
    assert EditorFolder(tmp_path).resume()[0] == 4
    assert EditorFolder(tmp_path).resume(whole(8)) == (0, None)


def test_leftovers_of_a_kill_are_removed(tmp_path: Path) -> None:
    folder = EditorFolder(tmp_path)
    save(folder, 2)
    for name in (
        "records/.step-000004.parquet.tmp",
        "monitors/.step-000004.parquet.tmp",
        "state/.step-000004.safetensors.tmp",
        ".edits.jsonl.tmp",
    ):
        (tmp_path / name).write_bytes(b"half")
    assert folder.resume()[0] == 2
    assert not list(tmp_path.rglob(".*"))


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("where", "name"), [(files.pq, "write_table"), (files.os, "fsync"), (files.os, "replace")])
def test_a_full_disk_is_reported_and_the_state_before_it_stays_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Any, name: str
) -> None:
    folder, complete = EditorFolder(tmp_path / "a"), EditorFolder(tmp_path / "b")
    save(folder, 4)
    save(complete, 6)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, full_disk)
        with pytest.raises(StoreError, match=r"no space left on the disk of .*: free some and go on with --resume"):
            folder.save(6, found((5, 6)), {"weight": torch.zeros(3, 2)})
    assert not list(folder.path.rglob(".*"))
    assert again(folder, 6) == 4
    assert content(folder) == content(complete)


def test_a_full_disk_under_the_state_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import safetensors.torch

    def full(*_: Any, **__: Any) -> None:
        raise files.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(StoreError, match="no space left"):
        write_state(tmp_path / "step-000001.safetensors", {"a": torch.zeros(1)})


def test_a_place_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="cannot be written"):
        write_json(tmp_path / "file" / "under" / "x.json", {})


def test_a_folder_that_holds_a_run_or_anything_is_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a").create({"run": "x"})
    with pytest.raises(StoreError, match=r"holds a run already: go on with --resume .*a, or choose another --out"):
        RunFolder(tmp_path / "a").create({"run": "x"})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    (tmp_path / "c").write_text("a file")
    for name in ("b", "c"):
        with pytest.raises(StoreError, match="is not an empty folder"):
            RunFolder(tmp_path / name).create({"run": "x"})
    assert (tmp_path / "b" / "thesis.txt").read_text() == "mine"


def test_a_folder_left_by_a_kill_before_the_manifest_can_be_used(tmp_path: Path) -> None:
    (tmp_path / ".manifest.json.tmp").write_text('{"ru')
    RunFolder(tmp_path).create({"run": "x"})
    assert RunFolder(tmp_path).manifest() == {"run": "x", "checksums": True}


def test_another_configuration_data_or_model_is_named(tmp_path: Path) -> None:
    stored = {"config": {"edits": 5, "seed": 0, "set": []}, "model_hash": "aa", "stream_hash": "bb"}
    folder = RunFolder(tmp_path)
    folder.create(stored)
    folder.check_same(stored, list(stored))
    moved = {**stored, "config": {**stored["config"], "data_root": "/new"}}
    folder.check_same(moved, list(stored), ["config.data_root"])
    now = {"config": {"edits": 6, "seed": 0, "set": []}, "model_hash": "cc", "stream_hash": "bb"}
    with pytest.raises(StoreError) as caught:
        folder.check_same(now, list(stored))
    assert [x.strip() for x in str(caught.value).splitlines()[1:]] == ["config.edits: stored 5, now 6", "model_hash: stored 'aa', now 'cc'"]


def test_a_version_that_asks_other_questions_says_so(tmp_path: Path) -> None:
    stored = {"config": {"edits": 5}, "schedule_hash": "aa", "versions": {"lifelong-editing-testbed": "0.1.0"}, "git": "abc1234"}
    RunFolder(tmp_path).create(stored)
    with pytest.raises(StoreError, match=r"asks other questions than the one that began it \(0\.1\.0, commit abc1234\)"):
        RunFolder(tmp_path).check_same({**stored, "schedule_hash": "bb"}, ["config", "schedule_hash"])


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "new")
    with folder.locked(), pytest.raises(StoreError, match="is being written by another process: wait for it, stop it, or"), folder.locked():
        raise AssertionError("held twice")
    with folder.locked():
        folder.create({"run": "x"})


def test_absent_and_broken_manifests_are_reported(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="is not a run folder"):
        RunFolder(tmp_path).manifest()
    (tmp_path / "manifest.json").write_text('{"run": ')
    with pytest.raises(StoreError, match=r"is not readable JSON .* start a new run"):
        RunFolder(tmp_path).manifest()


@few
@given(st.lists(rows_of(BaseAnswer), min_size=1, max_size=5, unique_by=lambda a: a.question_id), st.floats(0, 0.99))
def test_base_answers_come_back_or_are_asked_again(answers: list[BaseAnswer], part: float) -> None:
    with tempfile.TemporaryDirectory() as tmp:
        folder = RunFolder(Path(tmp))
        assert folder.base_answers() == {}
        folder.write_base_answers(answers)
        assert folder.base_answers() == {a.question_id: a for a in answers}
        file = Path(tmp) / "base" / "answers.parquet"
        file.write_bytes(file.read_bytes()[: int(part * file.stat().st_size)])
        assert folder.base_answers() == {}


def test_json_comes_back_and_is_written_at_once(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "x.json", {"b": [1, None], "a": "é"})
    assert read_json(tmp_path / "deep" / "x.json") == {"a": "é", "b": [1, None]}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["x.json"]


def test_what_was_not_measured_is_absent_and_not_zero(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.parquet", Record, [replace(record(1), token_hits=None, exact=None, logprob=None)])
    table = pq.read_table(tmp_path / "x.parquet")
    assert [table[c].null_count for c in ("token_hits", "exact", "logprob", "n_tokens")] == [1, 1, 1, 0]


def test_a_row_without_a_required_field_is_refused(tmp_path: Path) -> None:
    with pytest.raises((TypeError, ValueError, StoreError)):
        write_rows(tmp_path / "x.parquet", Record, [replace(record(1), seconds="long")])  # type: ignore[arg-type]
    assert not (tmp_path / "x.parquet").exists()
