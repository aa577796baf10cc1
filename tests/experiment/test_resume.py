"""A run killed anywhere and gone on with equals the run that was not, bit for bit but for time and memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.resumed_runs import EDITORS, assert_same, go_on, run, uninterrupted

CHAINS = {
    "a weight editor": ["resume 0", "apply 2 adam 3", "probe 8 generate 2", "rename 10", "resume 0", "write 15 again", "apply 14 adam 1"],
    "a codebook editor": ["rename 20 again", "probe 20 generate 1", "apply 7 adam 4", "rename 10 again", "probe 9 generate 1"],
}
"""Places at which one process after another is killed. The second chain spares the first editor from its second kill on."""


@pytest.mark.parametrize("name", list(CHAINS))
def test_killed_again_and_again(tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    first, *others = CHAINS[name]
    assert run(out, first).code == -9
    for kill in others:
        assert go_on(out, kill).code == -9, kill
        assert not (out / "summary.json").exists()
    done = go_on(out)
    assert done.code == 0, done.err
    assert_same(out)


def test_sigterm_ends_after_the_batch_in_hand_saved_and_says_how_to_go_on(tmp_path: Path) -> None:
    """First in the middle of an editor, between two saves; then in its last step, so that the next has not begun."""
    out = tmp_path / "run"
    for kill, message in (("apply 7 term", "finetune: stopped after step 7 of 20"), ("probe 20 term", "stopped before balancedit")):
        done = go_on(out, kill) if out.exists() else run(out, kill)
        assert done.code == 143
        assert f"{message}; everything up to there is saved. Go on with --resume {out}" in done.err
        assert [p.name for p in (out / "finetune/state").iterdir()] == [f"step-{int(kill.split()[1]):06d}.safetensors"]
        assert not (out / "summary.json").exists()
    assert go_on(out).code == 0
    assert_same(out)


def test_the_log_has_every_phase_in_order() -> None:
    """With save_every 5: apply and probe of each step, then two files written and renamed, three where there are monitors."""
    lines = uninterrupted().with_suffix(".log").read_text().splitlines()
    once = ["resume 0"]
    for step in range(1, 21):
        once += [f"apply {step}", f"probe {step}"]
        once += [f"{phase} {step}" for _ in range(2 if step == 15 else 3) for phase in ("write", "rename")] if step % 5 == 0 else []
    assert lines == once * 2


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(tmp_path: Path) -> None:
    whole = uninterrupted()
    before = {p: p.stat().st_mtime_ns for e in EDITORS for p in (whole / e).rglob("*") if p.is_file()}
    assert go_on(whole).code == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_cut_files_are_made_again(tmp_path: Path) -> None:
    """The base's answers, a record file and the reports of a finished run, cut in the middle; a record file gone, a state's bit flipped."""
    import shutil

    out = tmp_path / "run"
    shutil.copytree(uninterrupted(), out)
    (out / "balancedit/records/step-000010.parquet").unlink()
    for name in (
        "base/answers.parquet",
        "schedule.parquet",
        "finetune/records/step-000010.parquet",
        "balancedit/edits.jsonl",
        "summary.json",
    ):
        raw = (out / name).read_bytes()
        (out / name).write_bytes(raw[: len(raw) // 2])
    (state,) = (out / "finetune/state").iterdir()
    raw = bytearray(state.read_bytes())
    raw[-9] ^= 1
    state.write_bytes(raw)
    done = go_on(out)
    assert done.code == 0, done.err
    assert f"{state.name} is damaged" in done.err
    assert "balancedit starts again from its first edit" in done.err
    assert_same(out, said=True)
