"""`jsonl:` and `hub:`: maps of fields, half-written lines, datasets on disk, names with a colon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streams.base import BadStream, Stream, StreamConfig
from streams.files import hub
from testbed.core.registry import STREAMS, Registry, UnknownName
from tests.helpers.okedit_folder import paint


def row(i: int) -> dict[str, Any]:
    return {"q": f"Who owns {i}?", "a": {"name": f"Ann {i}"}, "old": [f"Bob {i}", f"Rob {i}"], "photo": f"{i % 5}.png"}


MAP = ("prompt=q", "target=a.name", "previous=old")


def own(root: Path, lines: list[str], *fields: str) -> Stream:
    (root / "own.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return STREAMS.get("jsonl:own.jsonl")(StreamConfig(data_root=root, fields=fields or MAP))


def test_a_map_reaches_into_objects_and_lists(tmp_path: Path) -> None:
    s = own(tmp_path, [json.dumps(row(i)) for i in range(60)])
    event = s.events(1)[0]
    i = event.target.split()[1]
    assert (event.prompt, event.target, event.previous) == (f"Who owns {i}?", f"Ann {i}", f"Bob {i}")
    stale = next(q for q in s.questions(event) if q.split == "stale")
    assert stale.golds == (f"Bob {i}", f"Rob {i}")
    assert s.name == "jsonl:own.jsonl"


def test_lines_that_cannot_be_read_are_skipped_and_named(tmp_path: Path) -> None:
    good = "\n".join(json.dumps(row(i)) for i in range(60)).encode()
    bad = [b'{"q": "\xff"}', b"", b"[1]", json.dumps(row(3)).encode(), b'{"q": "hal']
    (tmp_path / "own.jsonl").write_bytes(b"\n".join([good, *bad]))
    s = STREAMS.get("jsonl:own.jsonl")(StreamConfig(data_root=tmp_path, fields=MAP))
    reasons = {k.where: k.reason for k in s.skipped}
    assert reasons["own.jsonl line 61"].startswith("not UTF-8")
    assert reasons["own.jsonl line 65"].startswith("not valid JSON")
    assert reasons["record 60"] == "expected an object, found a list"
    assert reasons["record 61"] == "the same question stands in an earlier record"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("prompt=question",), r"'question' \(for prompt\) is no field; .*There are the fields q, a, old, photo"),
        (("prompt=q",), "nothing is given for target"),
        (("prompt=q", "target=a.name", "colour=q"), "'colour=q' is not OURS=THEIRS"),
        (("prompt",), "'prompt' is not OURS=THEIRS"),
    ],
)
def test_a_wrong_map_shows_the_fields_that_exist(tmp_path: Path, fields: tuple[str, ...], message: str) -> None:
    with pytest.raises(BadStream, match=message):
        own(tmp_path, [json.dumps(row(0))], *fields)


def test_pictures_lie_beside_the_file(tmp_path: Path) -> None:
    for i in range(4):
        paint(tmp_path / f"{i}.png", i)
    s = own(tmp_path, [json.dumps(row(i)) for i in range(50)], *MAP, "image=photo")
    assert {k.reason for k in s.skipped} == {"no file for image"}
    assert len(s.skipped) == 10
    image = s.events(1)[0].image
    assert image is not None
    assert image.load().shape == (6, 8, 3)


def test_without_old_answers_only_edit_and_stale_are_asked(tmp_path: Path) -> None:
    s = own(tmp_path, [json.dumps(row(i)) for i in range(80)], "prompt=q", "target=a.name")
    events = s.events(100)
    assert {q.split for e in events for q in s.questions(e)} <= {"edit", "stale"}
    assert not list(s.beliefs())
    assert not s.general()


def test_a_dataset_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([row(i) for i in range(60)]).save_to_disk(str(tmp_path / "set"))
    make = STREAMS.get(f"hub:{tmp_path / 'set'}")
    s = make(StreamConfig(fields=MAP))
    assert "60 usable of 60" in s.origin
    assert str(tmp_path) not in s.origin
    assert s.data_hash() == make(StreamConfig(fields=MAP)).data_hash()
    with pytest.raises(BadStream, match="There are the fields q, a, old, photo"):
        make(StreamConfig(fields=("prompt=nothing",)))
    with pytest.raises(BadStream, match="cannot be loaded"):
        STREAMS.get(f"hub:{tmp_path / 'no'}")(StreamConfig(fields=MAP))


def test_pictures_inside_a_dataset(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for i in range(5):
        paint(tmp_path / f"{i}.png", i)
    rows = [{k: row(i)[k] for k in ("q", "old")} | {"new": f"Ann {i}", "shown": str(tmp_path / f"{i % 5}.png")} for i in range(60)]
    rows[7]["shown"] = None
    table = datasets.Dataset.from_list(rows).cast_column("shown", datasets.Image())
    table.save_to_disk(str(tmp_path / "set"))
    for i in range(5):
        (tmp_path / f"{i}.png").unlink()
    fields = ("prompt=q", "target=new", "previous=old", "image=shown")
    s = STREAMS.get(f"hub:{tmp_path / 'set'}")(StreamConfig(fields=fields))
    assert "60 usable of 60" in s.origin
    events = s.events(200)
    shown = {e.image.key for e in events if e.image is not None}
    assert len(shown) == 5
    assert any(e.image is None for e in (*events, *s.train_pool().questions, *s.general()))
    first = next(e.image for e in events if e.image is not None)
    assert first.load().shape == (6, 8, 3)
    assert any(q.split == "locality_sibling" for e in events for q in s.questions(e))


def test_a_picture_that_is_gone_is_skipped_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    paint(tmp_path / "here.png", 1)
    rows = [{"prompt": f"Who owns {i}?", "target": f"Ann {i}", "image": str(tmp_path / "here.png")} for i in range(40)]
    rows[3]["image"] = str(tmp_path / "gone.png")
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    monkeypatch.setattr(hub, "_load", lambda *asked: table)
    (left,) = STREAMS.get(f"hub:{tmp_path}")(StreamConfig()).skipped
    assert (left.where, left.reason) == ("record 3", "picture in image of record 3 cannot be read: No such file or directory")


def test_a_picture_outside_the_dataset_is_skipped_and_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    for name in ("set/here.png", "secret.png"):
        paint(tmp_path / name, 1)
    rows = [{"prompt": f"Who owns {i}?", "target": f"Ann {i}", "image": str(tmp_path / "set" / "here.png")} for i in range(40)]
    rows[3]["image"], rows[4]["image"] = str(tmp_path / "secret.png"), str(tmp_path / "set" / ".." / "secret.png")
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    monkeypatch.setattr(hub, "_load", lambda *asked: table)
    left = STREAMS.get(f"hub:{tmp_path / 'set'}")(StreamConfig()).skipped
    assert [x.where for x in left] == ["record 3", "record 4"]
    assert all("leaves the dataset's folder" in x.reason for x in left)


def test_a_name_with_a_colon_carries_an_argument() -> None:
    registry = Registry("thing", "streams")
    base: Any = registry.register("from:")(type("Base", (), {"summary": "x"}))
    made: Any = registry.get("from:a:b/c")
    assert issubclass(made, base)
    assert (made.name, made.argument, base.name) == ("from:a:b/c", "a:b/c", "from:")
    assert registry.get("from:") is base
    with pytest.raises(UnknownName, match="no thing is called 'to:x'"):
        registry.get("to:x")
