"""The loop on a tiny random model: the floor, the ceiling, what is absent, what a failed edit leaves behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from streams.base import TrainPool
from testbed.core.checksums import read_lines
from testbed.core.events import LOCALITY_SPLITS, EditBatch
from testbed.core.registry import EDITORS
from testbed.core.schema import BaseAnswer, Record
from testbed.editors.base import BadEditor
from testbed.experiment.interrupt import Stopped, StopRequest
from testbed.experiment.loop import run_editor
from testbed.model.predictor import ModelPredictor
from testbed.storage.run_folder import EditorFolder
from tests.helpers.loop_runs import MEASURED, Nudge, context, run, shared
from tests.helpers.plain_stream import Line, PlainStream, plain

RIGHT = ("edit", "text_generality", "image_generality", "portability")


def reports(path: Path) -> list[dict[str, Any]]:
    return read_lines(path / "edits.jsonl")[0]


def answer(r: Record | BaseAnswer) -> tuple[Any, ...]:
    return tuple(getattr(r, name) for name in MEASURED)


def of_split(records: Sequence[Record], *splits: str) -> list[Record]:
    found = [r for r in records if r.split in splits]
    assert found
    return found


def test_records_follow_the_schedule_row_by_row(tmp_path: Path) -> None:
    where = shared()
    records = run(where, EDITORS.get("noop")(), tmp_path)
    planned = [(r.step, r.question_id, r.edit_id, r.probe, r.panel, r.incl_prob) for r in where.schedule.rows() if r.action == "probe"]
    assert [(r.probe_step, r.question_id, r.edit_id, r.probe, r.panel, r.incl_prob) for r in records] == planned
    times = {s.checkpoint.step: s.checkpoint.time for s in where.schedule.steps}
    assert all(r.probe_time == times[r.probe_step] for r in records)
    assert all((r.edit_id is None) == (r.edit_step is None) == (r.edit_time is None) == (r.target is None) for r in records)


def test_noop_gives_the_unedited_models_numbers_exactly(tmp_path: Path) -> None:
    where = shared()
    for r in run(where, EDITORS.get("noop")(), tmp_path):
        assert answer(r) == answer(where.base[r.question_id])


def test_an_editor_that_changes_nothing_but_answers_itself_agrees_with_the_base(tmp_path: Path) -> None:
    """As noop, but every question goes through the model again: the shortcut of noop gives the same answers."""
    where = shared()

    class Still(Nudge):
        name = "still"

        def _edit(self, batch: EditBatch) -> dict[str, float]:
            return {}

    for r in run(where, Still(), tmp_path):
        base = where.base[r.question_id]
        assert (r.generated, r.token_hits, r.n_tokens, r.exact) == (base.generated, base.token_hits, base.n_tokens, base.exact)
        assert r.logprob == pytest.approx(base.logprob, abs=1e-3)


def test_the_oracle_is_right_about_every_edit_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    where = shared()
    records = run(where, EDITORS.get("oracle")(), tmp_path)
    for r in of_split(records, *RIGHT, *LOCALITY_SPLITS):
        assert r.exact
        if r.edit_id is None:  # without a truth the oracle answers as the unedited model
            assert answer(r)[0:2] == answer(where.base[r.question_id])[0:2]
            continue
        assert r.token_hits == r.n_tokens
        assert r.logprob == 0 or not r.n_tokens
    assert not any(r.exact for r in of_split(records, "stale"))
    for r in of_split(records, "general", "text"):
        assert answer(r)[0:2] == answer(where.base[r.question_id])[0:2]


def test_a_revised_fact_is_judged_by_its_newest_answer(tmp_path: Path) -> None:
    where = shared()
    newest = {a.event.prompt: a.event for s in where.schedule.steps for a in s.edits}
    last = where.schedule.steps[-1].checkpoint.step
    end = [r for r in of_split(run(where, EDITORS.get("oracle")(), tmp_path), "edit") if r.probe_step == last]
    revised = [e for e in newest.values() if e.revises]
    assert revised
    assert {(r.edit_id, r.answer) for r in end} >= {(e.id, e.target) for e in revised}
    assert {r.edit_id for r in end} <= {e.id for e in newest.values()}


def test_locality_is_compared_with_what_the_unedited_model_said(tmp_path: Path) -> None:
    where = shared()
    records = run(where, Nudge(), tmp_path)
    for r in of_split(records, *LOCALITY_SPLITS):
        said = where.base[r.question_id].generated
        assert r.answer == (said or None)
        assert r.base_answer == said
        assert r.exact == (r.generated is not None and said is not None and _same(r.generated, said))
    for q in where.schedule.unique_questions.values():
        if q.split in LOCALITY_SPLITS and where.base[q.id].generated:
            assert where.base[q.id].exact
    for r in of_split(records, *RIGHT):
        assert r.answer != r.base_answer


def _same(a: str, b: str) -> bool:
    from testbed.core.grading import normalise

    return normalise(a) == normalise(b)


def test_a_question_that_several_panels_ask_is_put_to_the_model_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = shared()
    asked: list[int] = []
    respond = ModelPredictor.respond
    monkeypatch.setattr(ModelPredictor, "respond", lambda self, asks, *a: asked.append(len(asks)) or respond(self, asks, *a))
    records = run(where, Nudge(), tmp_path)
    distinct = {(r.probe_step, r.question_id) for r in records if r.split != "text"}
    assert sum(asked) == len(distinct) < sum(r.split != "text" for r in records)
    for a in records:
        distinct_answers = {answer(b) for b in records if (b.probe_step, b.question_id) == (a.probe_step, a.question_id)}
        assert len(distinct_answers) == 1


def test_what_was_not_measured_is_absent(tmp_path: Path) -> None:
    where = shared()
    for r in of_split(run(where, Nudge(), tmp_path), "text"):
        assert (r.token_hits, r.generated, r.exact, r.answer) == (None, None, None, None)
        assert r.n_tokens is not None
        assert r.n_tokens > 0
        assert r.logprob is not None
        assert r.logprob < 0
    silent = [
        a for a in where.base.values() if a.generated == "" and where.schedule.unique_questions[a.question_id].split in LOCALITY_SPLITS
    ]
    assert all((a.token_hits, a.n_tokens, a.logprob) == (None, None, None) for a in silent)


def test_a_failed_edit_is_reported_and_leaves_the_state_as_it_was(tmp_path: Path) -> None:
    stream = PlainStream([Line(1.0), Line(1.1, target="bad"), Line(1.2)])
    editor = Nudge()
    run(context(stream), editor, tmp_path)
    lines = reports(tmp_path)
    assert [list(r["failed"].items()) for r in lines] == [[], [(stream.all[1].id, "the loss became nan")], []]
    assert [r["notes"] for r in lines] == [{"loss": 0.5}, {}, {"loss": 0.5}]
    assert float((editor.weight - editor.handle.parameter(editor.handle.down_weight(-1)))[0, 0]) == 2.0


def test_one_bad_edit_of_a_batch_costs_itself_alone(tmp_path: Path) -> None:
    stream = PlainStream([Line(1.0), Line(1.1, target="bad"), Line(1.2)])
    editor = Nudge()
    run(context(stream, batch=2), editor, tmp_path)
    lines = reports(tmp_path)
    assert [list(r["failed"]) for r in lines] == [[stream.all[1].id], []]
    assert [r["notes"] for r in lines] == [{"loss": 0.5, "parts": 2.0}, {"loss": 0.5}]
    assert float((editor.weight - editor.handle.parameter(editor.handle.down_weight(-1)))[0, 0]) == 2.0


def test_states_are_saved_by_edits_not_by_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    keep = EditorFolder.save
    monkeypatch.setattr(EditorFolder, "save", lambda self, n, *rest: (saved.append(n), keep(self, n, *rest)))
    run(context(plain(9, per_year=9), batch=2, save_every=4), Nudge(), tmp_path)
    assert saved == [2, 4, 5]


def test_memory_that_runs_out_is_said_and_the_run_goes_on_in_smaller_parts(tmp_path: Path) -> None:
    class Small(Nudge):
        def _edit(self, batch: EditBatch) -> dict[str, float]:
            if len(batch) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super()._edit(batch)

    said: list[str] = []
    editor, stream = Small(), PlainStream([Line(1.0), Line(1.1), Line(1.2), Line(1.3)])
    run(replace(context(stream, batch=2), say=said.append), editor, tmp_path)
    assert said[1:] == ["nudge: memory ran out with 2 edits at once at step 1: from there on at most 1 are made at once"]
    assert [(r["failed"], r["notes"]["parts"]) for r in reports(tmp_path)] == [({}, 2)] * 2
    assert float((editor.weight - editor.handle.parameter(editor.handle.down_weight(-1)))[0, 0]) == 4.0


def test_a_run_that_is_asked_to_stop_ends_after_the_step_and_is_saved(tmp_path: Path) -> None:
    where = shared()
    whole = run(where, Nudge(), tmp_path / "whole")
    stop = StopRequest()
    folder = EditorFolder(tmp_path / "cut")
    with pytest.raises(Stopped, match="nudge: stopped after step 3 of 7"):
        run_editor(replace(where, stop=stop), Nudge(), folder, lambda name, step: stop.request() if (name, step) == ("apply", 3) else None)
    assert folder.newest()[0] == 3
    assert [_untimed(r) for r in run(where, Nudge(), tmp_path / "cut")] == [_untimed(r) for r in whole]


def test_a_second_signal_ends_the_process_as_it_would_have() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        stop = StopRequest()
        with stop.on_signal(signal.SIGUSR1):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.requested and not seen
            os.kill(os.getpid(), signal.SIGUSR1)
            assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_retire_is_skipped_and_counted_where_there_is_no_undo(tmp_path: Path) -> None:
    stream = PlainStream([Line(1.0), Line(1.1, 0, "retire")])
    editor = Nudge()
    run(context(stream), editor, tmp_path)
    assert reports(tmp_path)[1]["skipped"] == {stream.all[1].id: "retire: this method has no undo"}
    assert len(editor.seen) == 1


def test_an_editor_sees_no_more_than_its_traits_declare(tmp_path: Path) -> None:
    where = shared()
    editor = Nudge()
    run(where, editor, tmp_path)
    asked = {q.prompt for q in where.schedule.unique_questions.values() if q.split != "edit" and q.split != "stale"}
    assert editor.pool == TrainPool()
    for batch in editor.seen:
        assert batch.paraphrases == {}
        assert all(e.previous is None for e in batch.events)
        assert not asked & {e.prompt for e in batch.events}


def test_a_batch_over_the_limit_is_refused_with_the_number(tmp_path: Path) -> None:
    with pytest.raises(BadEditor, match="nudge takes at most 2 edits at once, got 3: use --batch 2"):
        run(context(plain(3), batch=3), Nudge(), tmp_path)


def test_reports_say_what_an_edit_costs(tmp_path: Path) -> None:
    where = shared()
    run(where, Nudge(), tmp_path)
    lines = reports(tmp_path)
    assert [r["step"] for r in lines] == [s.checkpoint.step for s in where.schedule.steps]
    assert [r["event_ids"] for r in lines] == [[a.event.id for a in s.edits] for s in where.schedule.steps]
    assert all(r["seconds"] > 0 and r["peak_bytes"] > 10**7 for r in lines)
    assert {r["state_bytes"] for r in lines} == {where.handle.parameter(where.handle.down_weight(-1)).numel() * 4}
    norms = [r["delta_norm"] for r in lines]
    assert norms == sorted(norms)
    assert norms[0] == pytest.approx(where.handle.width**0.5)


@pytest.mark.parametrize("order", [("small", "large"), ("large", "small")])
def test_the_peak_memory_of_an_editor_is_its_own(order: tuple[str, str], tmp_path: Path) -> None:
    class Large(Nudge):
        def _edit(self, batch: EditBatch) -> dict[str, float]:
            torch.ones(75_000_000).sum()
            return super()._edit(batch)

    peaks = {}
    for name in order:
        run(shared(), Large() if name == "large" else Nudge(), tmp_path / name)
        peaks[name] = max(r["peak_bytes"] for r in reports(tmp_path / name))
    assert peaks["large"] - peaks["small"] == pytest.approx(300e6, rel=0.2)


class Killed(BaseException):
    """Stands for the process ending here."""


@pytest.mark.parametrize("kill", [("apply", 1), ("apply", 4), ("probe", 5), ("rename", 4), ("write", 7)])
def test_stopped_and_resumed_the_records_are_the_same(tmp_path: Path, kill: tuple[str, int]) -> None:
    where = shared()
    whole = run(where, Nudge(), tmp_path / "whole")

    def phase(*now: Any) -> None:
        if now == kill:
            raise Killed

    folder = EditorFolder(tmp_path / "cut", phase)
    with pytest.raises(Killed):
        run_editor(where, Nudge(), folder, phase)
    again = run(where, Nudge(), tmp_path / "cut")
    assert [_untimed(r) for r in again] == [_untimed(r) for r in whole]
    timed = ("seconds", "peak_bytes")
    strip = [[{k: v for k, v in r.items() if k not in timed} for r in reports(tmp_path / name)] for name in ("whole", "cut")]
    assert strip[0] == strip[1]


def _untimed(record: Record) -> tuple[Any, ...]:
    return tuple(getattr(record, name) for name in Record.__slots__ if name != "seconds")


def test_a_finished_editor_is_left_alone(tmp_path: Path) -> None:
    where = shared()
    first = run(where, Nudge(), tmp_path)

    class Untouchable(Nudge):
        def prepare(self, handle: Any, pool: TrainPool) -> None:
            raise AssertionError("a finished editor needs no preparation")

    assert run(where, Untouchable(), tmp_path) == first


def test_progress_gives_edits_and_success(tmp_path: Path) -> None:
    seen: list[tuple[Any, ...]] = []
    run(shared(), EDITORS.get("oracle")(), tmp_path, progress=lambda *a: seen.append(a))
    assert [(done, total) for done, total, _ in seen] == [(i, 7) for i in range(1, 8)]
    assert [s for _, _, s in seen] == [1.0] * 7


def test_the_model_is_as_it_was_after_a_run(tmp_path: Path) -> None:
    from testbed.model.handle import weights_hash

    where = shared()
    before = weights_hash(where.handle.model)
    run(where, Nudge(), tmp_path)
    assert weights_hash(where.handle.model) == before
