"""Pictures that cannot be decoded: a run refuses them, and with `--missing-images skip` leaves them out and says which."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streams.base import BadStream, Stream, StreamConfig
from testbed import run as command
from testbed.core.events import BadPicture
from testbed.core.registry import STREAMS
from testbed.experiment import runner
from tests.helpers.okedit_folder import make_folder, paint
from tests.streams import test_mmedit as mmedit

LEFT_OUT = "a question is not asked: its picture is broken"


def cut(path: Path) -> None:
    """Leave half of a picture's file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def own_records(folder: Path, n: int = 40) -> None:
    rows = [{"prompt": f"Who owns {i}?", "target": f"Ann {i}", "previous": f"Bob {i}", "image": f"{i}.png"} for i in range(n)]
    (folder / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i in range(n):
        paint(folder / f"{i}.png", 1000 * i)


def pictures(s: Stream) -> set[str]:
    """The names of all pictures that are edited, asked about or trained on."""
    events = s.events(10**4)
    asked = [q for e in events for q in s.questions(e)]
    used: list[Any] = [*events, *asked, *s.general(), *s.train_pool().questions]
    used += [a for t in s.train_pool().edits for a in t.asks()]
    return {x.image.name for x in used if x.image is not None}


def test_a_record_and_a_question_with_a_broken_picture_are_left_out(tmp_path: Path) -> None:
    root = mmedit.folder(tmp_path, mmedit.ROWS)
    for r in mmedit.ROWS:
        paint(root / r["image_rephrase"], 7)
        paint(root / "images" / r["m_loc"], 9)
    used = pictures(mmedit.stream(root))
    photo = mmedit.ROWS[4]["image"]
    rephrased = next(r["image_rephrase"] for r in mmedit.ROWS[6:] if r["image_rephrase"] in used)
    local = next(r["m_loc"] for r in mmedit.ROWS[20:] if r["m_loc"] in used)
    for path in (root / "images" / photo, root / rephrased, root / "images" / local):
        cut(path)
    plain, skip = mmedit.stream(root), mmedit.stream(root, missing_images="skip")
    assert not plain.skipped
    assert pictures(plain) - pictures(skip) >= {photo, rephrased, local}
    assert [(s.where, s.reason) for s in skip.skipped] == [
        (f"vqa_eval.json record {i}, picture {photo}", "its picture is broken") for i in (4, 5)
    ]
    manifest = skip.manifest()
    assert manifest["skipped_by_reason"] == {"its picture is broken": 2} and manifest["passed_over"] == {LEFT_OUT: 2}
    assert list(manifest["broken_images"]) == sorted([photo, rephrased, local])
    assert all("not a picture, or cut short" in problem for problem in manifest["broken_images"].values())
    assert "2 of them left out for broken pictures" in skip.origin and plain.data_hash() != skip.data_hash()
    assert f"broken pictures, left out: 3 ({', '.join(sorted([photo, rephrased, local]))})" in skip.notes([])


def test_pictures_that_are_listed_late_are_tried_too(tmp_path: Path) -> None:
    make_folder(tmp_path, list(range(1000, 1400, 10)))
    for n in range(1000, 1400, 10):
        cut(tmp_path / "rephrased_images" / str(n) / "0.png")
    okedit = STREAMS.get("okedit-yearly")
    plain, skip = (okedit(StreamConfig(data_root=tmp_path, missing_images=p)) for p in ("skip-absent", "skip"))
    assert any(name.endswith("/0.png") for name in pictures(plain))
    assert not any(name.endswith("/0.png") for name in pictures(skip)) and any(name.endswith("/1.png") for name in pictures(skip))
    (line,) = (line for line in skip.notes([]) if line.startswith("broken pictures"))
    assert "... and " in line and line.count(".png") == 10


def test_whole_pictures_change_nothing(tmp_path: Path) -> None:
    own_records(tmp_path)
    plain, skip = (STREAMS.get("jsonl:own.jsonl")(StreamConfig(data_root=tmp_path, missing_images=p)) for p in ("skip-absent", "skip"))
    assert (plain.data_hash(), plain.origin, plain.events(30)) == (skip.data_hash(), skip.origin, skip.events(30))
    for i in range(40):
        cut(tmp_path / f"{i}.png")
    with pytest.raises(BadStream, match="the picture of every record is broken"):
        STREAMS.get("jsonl:own.jsonl")(StreamConfig(data_root=tmp_path, missing_images="skip"))


def test_a_run_refuses_a_broken_picture_and_says_how_to_go_on(tmp_path: Path) -> None:
    own_records(tmp_path)
    cut(tmp_path / "7.png")
    words = ["--stream", "jsonl:own.jsonl", "--data-root", str(tmp_path), "--editor", "noop", "--edits", "60", "--batch", "30"]
    words += ["--set", "stream.retire=0"]
    with pytest.raises(BadPicture, match=r"7\.png is not a picture, or cut short.*\n--missing-images skip leaves out"):
        runner.prepare(command.parse(words).resolve())
    manifest = runner.prepare(command.parse([*words, "--missing-images", "skip"]).resolve()).manifest
    assert manifest["stream"]["skipped_records"] == ["record 7, picture 7.png: its picture is broken"]
    assert list(manifest["stream"]["broken_images"]) == ["7.png"]
    assert "broken pictures, left out: 1 (7.png)" in manifest["notes"]  # which are shown as the run begins
