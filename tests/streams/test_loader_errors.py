"""Broken files: whole-file trouble is a `BadStream` that says where and what to do, one bad record is skipped."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from streams.base import BadStream, StreamConfig
from streams.files.pictures import FilePicture, numbered
from testbed.core.events import BadPicture, Picture, check_order
from testbed.core.registry import STREAMS
from tests.helpers.okedit_folder import ANNOTATIONS, QUESTIONS, annotation, make_folder, paint, question

OkeditYearly = STREAMS.get("okedit-yearly")

HERE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "okedit", list(range(1005, 1255, 10)))


def edit(folder: Path, file: str, change: Any) -> None:
    """Rewrite one JSON file: `change` mutates the parsed value."""
    value = json.loads((folder / file).read_text())
    change(value)
    (folder / file).write_text(json.dumps(value))


def stream(folder: Path, **config: Any) -> OkeditYearly:
    return OkeditYearly(StreamConfig(data_root=folder, **config))


def use(s: OkeditYearly) -> None:
    """Everything a run asks of a stream."""
    events = s.events(40)
    check_order(events)
    for e in events:
        assert all(q.event_id == e.id for q in s.questions(e))
        s.paraphrases(e)
    s.general(), s.train_pool(), list(s.beliefs()), s.manifest()


# whole files -------------------------------------------------------------------------------------------------


def _write(file: str, content: bytes) -> Any:
    return lambda folder: (folder / file).write_bytes(content)


WHOLE_FILE = {
    "annotations cut short": (_write(ANNOTATIONS, b'{"annotations": [\n{"question_id": 10'), [ANNOTATIONS, "line 2", "byte", "download"]),
    "empty file": (_write(ANNOTATIONS, b""), [ANNOTATIONS, "line 1", "byte 0 of 0"]),
    "not UTF-8": (_write(QUESTIONS, b'{"questions": ["\xff"]}'), [QUESTIONS, "UTF-8", "0xff at byte 16"]),
    "a list at the top": (_write(ANNOTATIONS, b"[]"), [ANNOTATIONS, "expected an object", "found a list"]),
    "a field at the top is absent": (_write(QUESTIONS, b'{"quest": 1}'), [QUESTIONS, "'questions'", "'quest'"]),
    "a field at the top is no list": (_write(ANNOTATIONS, b'{"annotations": {}}'), [ANNOTATIONS, "expected a list", "an object"]),
    "no records": (_write(ANNOTATIONS, b'{"annotations": []}'), ["none of 0 records"]),
    "deep nesting": (_write(ANNOTATIONS, b"[" * 200_000), [ANNOTATIONS, "JSON"]),
    "a huge number": (_write(ANNOTATIONS, b'{"annotations": [' + b"9" * 10_000 + b"]}"), [ANNOTATIONS, "JSON"]),
    "questions absent": (lambda f: (f / QUESTIONS).unlink(), [QUESTIONS, "is absent"]),
    "no photos": (lambda f: shutil.rmtree(f / "val2014"), ["none of 25 records", "25 x no photo", "*2014/COCO_*"]),
}


@pytest.mark.parametrize("name", list(WHOLE_FILE))
def test_a_broken_file_is_refused_with_its_name(folder: Path, name: str) -> None:
    spoil, expected = WHOLE_FILE[name]
    spoil(folder)
    with pytest.raises(BadStream) as caught:
        stream(folder)
    for part in expected:
        assert part in str(caught.value)


def test_a_wrong_data_root_is_refused_with_the_right_one(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadStream, match=r"one level too high.*okedit"):
        stream(tmp_path)
    make_folder(tmp_path / "second", [1005, 1015])
    with pytest.raises(BadStream, match=r"one level too high. Give as data root .*okedit or .*second"):
        stream(tmp_path)
    with pytest.raises(BadStream, match="is not a folder"):
        stream(tmp_path / "nowhere")
    with pytest.raises(BadStream, match=r"Expected mscoco_.*found COCO_val2014.* more"):
        stream(folder / "val2014")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadStream, match="found nothing"):
        stream(tmp_path / "empty")


def test_two_splits_in_one_folder_need_a_choice(folder: Path) -> None:
    for file in (ANNOTATIONS, QUESTIONS):
        shutil.copy(folder / file, folder / file.replace("val2014", "train2014"))
    with pytest.raises(BadStream, match=r"2 OKEDIT splits.*train2014.*val2014"):
        stream(folder)
    assert "train2014 (25 usable" in stream(folder / ANNOTATIONS.replace("val2014", "train2014")).origin


def test_bad_configuration_is_refused(folder: Path) -> None:
    with pytest.raises(BadStream, match=r"edits_per_year must be 1 or more, got 0; stream.revise"):
        stream(folder, edits_per_year=0, revise=2.0)


# single records ----------------------------------------------------------------------------------------------


def _set(file: str, field: str, value: Any) -> Any:
    rows = "annotations" if file == ANNOTATIONS else "questions"
    return lambda folder: edit(folder, file, lambda top: top[rows][3].__setitem__(field, value))


def _repeat(file: str, rows: str) -> Any:
    return lambda folder: edit(folder, file, lambda top: top[rows].append(top[rows][3]))


ONE_RECORD = {
    "empty target": (_set(ANNOTATIONS, "counterfact_answer", "  "), "counterfact_answer is empty"),
    "target equals the answer": (
        _set(ANNOTATIONS, "counterfact_answer", "The Dog."),
        "counterfact_answer equals the answer before the edit",
    ),
    "target is a truth value": (_set(ANNOTATIONS, "counterfact_answer", True), "counterfact_answer must be text, found a truth value"),
    "target is null": (_set(ANNOTATIONS, "counterfact_answer", None), "counterfact_answer is null"),
    "half a character": (_set(ANNOTATIONS, "counterfact_answer", "\ud800"), "counterfact_answer holds half a character (a lone surrogate)"),
    "answers empty": (_set(ANNOTATIONS, "answers", []), "answers holds no answer"),
    "answers of texts": (_set(ANNOTATIONS, "answers", ["dog"]), "answers must hold objects with an 'answer', found text"),
    "answers absent": (_set(ANNOTATIONS, "answers", None), "answers must be a list of answers, found null"),
    "question empty": (_set(QUESTIONS, "question", ""), "question is empty"),
    "rephrasings an object": (_set(QUESTIONS, "rephrased_questions", {}), "rephrased_questions must be text, found an object"),
    "rephrasing a truth value": (
        _set(QUESTIONS, "rephrased_questions_train", [True]),
        "rephrased_questions_train must be text, found a truth value",
    ),
    "locality answer an object": (_set(ANNOTATIONS, "locality_answer", {}), "locality_answer must be text, found an object"),
    "other photo": (_set(QUESTIONS, "image_id", 1), "image_id differs between question and annotation"),
    "id not a number": (_set(ANNOTATIONS, "question_id", "x"), "question_id must be a whole number, found text"),
    "image id negative": (_set(ANNOTATIONS, "image_id", -4), "image_id must be a whole number, found a number"),
    "id twice, annotations": (_repeat(ANNOTATIONS, "annotations"), "question_id stands twice"),
    "id twice, questions": (_repeat(QUESTIONS, "questions"), "question_id stands twice"),
    "no photo": (lambda f: (f / "val2014" / f"COCO_val2014_{103:012d}.jpg").unlink(), "no photo *2014/COCO_*_<image_id>.jpg"),
    "empty photo": (lambda f: (f / "val2014" / f"COCO_val2014_{103:012d}.jpg").write_bytes(b""), "the photo's file is empty"),
    "a row that is no object": (lambda f: edit(f, ANNOTATIONS, lambda top: top["annotations"].append(5)), "expected an object"),
}


@pytest.mark.parametrize("name", list(ONE_RECORD))
def test_a_bad_record_is_skipped_and_named(folder: Path, name: str) -> None:
    spoil, reason = ONE_RECORD[name]
    spoil(folder)
    s = stream(folder)
    assert reason in [k.reason for k in s.skipped]
    assert all(".json" in k.where for k in s.skipped)
    manifest = s.manifest()
    assert manifest["skipped"] == len(s.skipped) <= 2
    assert manifest["skipped_by_reason"][reason] == 1
    use(s)


def test_orphans_and_repeated_facts_are_skipped(folder: Path) -> None:
    edit(folder, QUESTIONS, lambda top: top["questions"].pop())
    edit(folder, ANNOTATIONS, lambda top: top["annotations"].pop(0))
    edit(folder, ANNOTATIONS, lambda top: top["annotations"].append(annotation(1026)))
    edit(folder, QUESTIONS, lambda top: top["questions"].append(question(1026) | {"question": "what animal is number 1025"}))
    reasons = sorted(k.reason for k in stream(folder).skipped)
    assert reasons == [
        "no annotation has this question_id",
        "no question has this question_id",
        "the same question about the same photo stands in an earlier record",
    ]


def test_missing_photos_by_policy(folder: Path) -> None:
    (folder / "val2014" / f"COCO_val2014_{103:012d}.jpg").unlink()
    assert "24 usable" in stream(folder, missing_images="skip").origin
    asked = stream(folder, missing_images="text")
    assert "25 usable" in asked.origin
    use(asked)
    without_photo = [e.source for e in asked._data.entries if e.image is None]  # pyright: ignore
    assert without_photo == ["okedit val2014 question 1035"]
    refused = stream(folder, missing_images="caption")
    assert any("OKEDIT has no captions" in k.reason for k in refused.skipped)


def test_optional_fields_may_be_absent(folder: Path) -> None:
    def strip(top: Any) -> None:
        for row in next(v for v in top.values() if isinstance(v, list)):
            for field in ("rephrased_questions", "rephrased_questions_train", "locality_answer", "question_type"):
                row.pop(field, None)

    edit(folder, ANNOTATIONS, strip)
    edit(folder, QUESTIONS, strip)
    shutil.rmtree(folder / "rephrased_images")
    s = stream(folder)
    assert not s.skipped
    event = s.events(1)[0]
    assert event.relation == "other"
    splits = {q.split for q in s.questions(event)}
    assert {"edit", "stale", "locality_hard"} <= splits
    assert not splits & {"text_generality", "image_generality"}
    shutil.rmtree(folder / "locality_images_dalle2")
    assert "locality_hard" not in {q.split for q in stream(folder).questions(event)}


def test_entities_bom_and_odd_ids_are_read(folder: Path) -> None:
    edit(folder, ANNOTATIONS, lambda top: top["annotations"][3].update(counterfact_answer="salt &amp; pepper", question_id="1035"))
    raw = (folder / ANNOTATIONS).read_bytes()
    (folder / ANNOTATIONS).write_bytes(b"\xef\xbb\xbf" + raw)
    s = stream(folder)
    assert not s.skipped
    entries = {e.source: e for e in s._data.entries}  # pyright: ignore
    assert entries["okedit val2014 question 1035"].target == "salt & pepper"
    assert entries["okedit val2014 question 1035"].relation == "Animals & co"


def test_an_event_of_another_stream_is_refused(folder: Path, tmp_path: Path) -> None:
    other = make_folder(tmp_path / "other", [90005 + 10 * i for i in range(9)])
    with pytest.raises(BadStream, match="is not of this stream"):
        stream(folder).questions(stream(other).events(1)[0])


# pictures ----------------------------------------------------------------------------------------------------


def test_a_picture_is_rgb_and_named_by_content(tmp_path: Path) -> None:
    for mode, colour in (("RGB", (200, 10, 30)), ("L", 77), ("RGBA", (1, 2, 3, 0)), ("P", 3), ("CMYK", (0, 0, 0, 0)), ("1", 1)):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (5, 4), colour).save(path)
        pixels = FilePicture(tmp_path, path.name).load()
        assert (pixels.shape, pixels.dtype) == ((4, 5, 3), np.uint8)
    os.makedirs(tmp_path / "a" / "b")
    shutil.copy(tmp_path / "RGB.png", tmp_path / "a" / "b" / "copy.png")
    original, copy = FilePicture(tmp_path, "RGB.png"), FilePicture(tmp_path / "a", "b/copy.png")
    assert isinstance(original, Picture)
    assert original.key == copy.key != FilePicture(tmp_path, "L.png").key
    assert str(tmp_path) not in original.key


def test_deep_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert FilePicture(tmp_path, "deep.png").load()[0, :, 0].tolist() == [0, 128, 255]


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    image = Image.new("RGB", (6, 2), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert FilePicture(tmp_path, "turned.jpg").load().shape == (6, 2, 3)


def _cut(path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:900])


def _big_text(path: Path) -> None:
    path.write_text("hello")
    os.truncate(path, 100_000_000)


BAD_PICTURES = {
    "absent": (lambda p: None, "absent"),
    "a folder": (lambda p: p.mkdir(), "absent or not a file"),
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "a text": (lambda p: p.write_text("hello"), "not a picture"),
    "cut short": (_cut, "cut short"),
    "a bomb": (lambda p: Image.new("1", (10_000, 6_000)).save(p, "png"), "60000|10000 x 6000"),
    "a hundred megabytes of text": (_big_text, "not a picture"),
    "floats": (lambda p: Image.new("F", (3, 3)).save(p, "tiff"), "32-bit"),
}


@pytest.mark.parametrize("name", list(BAD_PICTURES))
def test_a_bad_picture_says_so(tmp_path: Path, name: str) -> None:
    make, message = BAD_PICTURES[name]
    make(tmp_path / "x.jpg")
    with pytest.raises(BadPicture, match=message):
        FilePicture(tmp_path, "x.jpg").load()


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/passwd", "a/../../x.jpg", "", "..\\x.jpg", "C:/x.jpg", "a\0b"])
def test_a_path_may_not_leave_the_root(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadPicture, match="leaves the folder"):
        FilePicture(tmp_path, name).load()


@HERE
@given(data=st.data())
def test_spoiled_picture_bytes_raise_only_bad_picture(tmp_path: Path, data: st.DataObject) -> None:
    suffix = data.draw(st.sampled_from(["jpg", "png", "webp", "gif", "tiff"]))
    path = tmp_path / f"spoiled.{suffix}"
    Image.new("RGB", (9, 7), (9, 99, 200)).save(path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(raw[: data.draw(st.integers(1, len(raw)))]))
    try:
        found = FilePicture(tmp_path, path.name).load().dtype
    except BadPicture as e:
        found = path.name in str(e)
    assert found in (np.dtype(np.uint8), True)


def test_numbered_pictures_come_in_numeric_order(tmp_path: Path) -> None:
    for name in ("10.png", "2.jpg", "0.webp", "notes.png", "3.txt.png"):
        paint(tmp_path / "f" / name, 1)
    (tmp_path / "f" / "1.txt").write_text("x")
    (tmp_path / "f" / "4.png").write_bytes(b"")
    assert [p.name for p in numbered(tmp_path, "f")] == ["f/0.webp", "f/2.jpg", "f/3.txt.png", "f/10.png"]
    assert not list(numbered(tmp_path, "absent"))
