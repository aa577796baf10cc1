"""Late against early: the same edits and questions, in turn, by two states of one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from testbed.bench import __main__ as bench
from testbed.bench.late import Late, lates
from testbed.core.events import EditBatch
from testbed.core.schema import EditReport
from testbed.editors.base import Editor
from testbed.storage.files import StoreError
from tests.helpers.small_run import EDITS, small_run

EDITORS = ("noop", "finetune", "balancedit")


def test_both_make_the_same_edits_behind_those_of_the_run_and_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int, tuple[str, ...]]] = []
    run, apply = small_run(), Editor.apply

    def watched(self: Editor, batch: EditBatch) -> EditReport:
        seen.append((self.name, id(self), batch.step, tuple(e.id for e in batch.events)))
        return apply(self, batch)

    monkeypatch.setattr(Editor, "apply", watched)
    lines = list(lates(run, first=2, edits=3, questions=4))
    assert [(x.editor, x.early, x.late) for x in lines] == [(n, 2, EDITS) for n in EDITORS]
    for name in EDITORS:
        own = [x[1:] for x in seen if x[0] == name]
        again, turns = own[:2], own[2:]  # the early state is made again by the first two edits
        assert [step for _, step, _ in again] == [1, 2]
        assert [step for _, step, _ in turns] == [n for n in range(EDITS + 1, EDITS + 4) for _ in (0, 1)]
        early = again[0][0]
        assert [who == early for who, _, _ in turns] == [False, True, True, False, False, True]
        assert all(a[1:] == b[1:] for a, b in zip(turns[::2], turns[1::2], strict=True))


def test_what_is_told_of_late_and_early() -> None:
    line = next(x for x in lates(small_run(), first=2, edits=2, questions=3) if x.editor == "balancedit")
    assert line.edit_early and line.edit_late and line.edit_times == pytest.approx(line.edit_late / line.edit_early)
    assert line.question_times is not None and line.question_times > 0
    assert {"train", "keys", "capture", "insert"} <= {part.split()[0] for part in line.edit_stages.split(", ")}
    assert {"prefill", "decode"} <= {part.split()[0] for part in line.question_stages.split(", ")}
    assert Late("a", 1, 2, 1.0, 3.0, "", None, None, "").question_times is None


def test_a_run_that_is_too_short_or_a_stream_that_ends_is_told() -> None:
    with pytest.raises(StoreError, match=f"has {EDITS} edits, not more than {EDITS}"):
        next(lates(small_run(), first=EDITS, edits=1, questions=1))
    with pytest.raises(StoreError, match="has no edits beyond"):
        next(lates(small_run(), first=2, edits=0, questions=1))


def test_the_command_writes_a_line_an_editor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--what", "late", "--run", str(small_run()), "--at", "2", "--edits", "2", "--questions", "2", "--out", str(tmp_path / "b.json")]
    assert bench.main(args) == 0
    assert [x["editor"] for x in json.loads((tmp_path / "b.json").read_text())["late"]] == list(EDITORS)
    assert "edit times" in " ".join(capsys.readouterr().out.split())
    assert bench.main(["--what", "late"]) == 2
    assert "--what late reads a run folder" in capsys.readouterr().err
