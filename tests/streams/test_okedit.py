"""`okedit-yearly`: the real files where TESTBED_DATA names them, the two origins."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from streams.base import StreamConfig
from streams.files.okedit import OkeditFiles
from streams.files.records import normalize
from testbed.core.registry import STREAMS
from tests.helpers.okedit_folder import ANNOTATIONS, QUESTIONS, make_folder

OkeditYearly = STREAMS.get("okedit-yearly")

CARD = Path(__file__).parents[2] / "streams" / "cards" / "okedit-yearly.md"


def test_files_and_world_never_share_an_origin(tmp_path: Path) -> None:
    files = OkeditYearly(StreamConfig(data_root=make_folder(tmp_path, [1005, 1015, 1025])))
    world = OkeditYearly(StreamConfig())
    assert (files.time_axis, world.time_axis) == ("scheduled", "simulated")
    assert files.manifest()["time_axis"] == "scheduled"
    assert world.manifest()["time_axis"] == "simulated"
    assert "simulated" in world.origin
    assert "simulated" not in files.origin
    assert str(tmp_path) not in files.origin
    assert files.data_hash() != world.data_hash()


def test_the_path_of_the_folder_does_not_matter(tmp_path: Path) -> None:
    ids = list(range(1005, 1255, 10))
    one = OkeditYearly(StreamConfig(data_root=make_folder(tmp_path / "one", ids)))
    two = OkeditYearly(StreamConfig(data_root=make_folder(tmp_path / "deep" / "two", ids)))
    assert one.data_hash() == two.data_hash()
    assert one.stream_hash(one.events(50)) == two.stream_hash(two.events(50))
    assert [q.id for e in one.events(9) for q in one.questions(e)] == [q.id for e in two.events(9) for q in two.questions(e)]


def test_a_copy_of_an_edited_photo_is_no_locality_picture(tmp_path: Path) -> None:
    """Where the locality picture is, byte for byte, the photo of a record that asks the same, it is not asked."""
    ids = list(range(1005, 1105, 10))
    make_folder(tmp_path, ids)
    event = OkeditYearly(StreamConfig(data_root=tmp_path)).events(1)[0]
    qid = int(event.source.split()[-1])
    target = tmp_path / "locality_images_dalle2" / str(qid)
    (target / "0.webp").unlink()
    (target / "0.jpg").write_bytes((tmp_path / "val2014" / f"COCO_val2014_{qid // 10:012d}.jpg").read_bytes())
    stream = OkeditYearly(StreamConfig(data_root=tmp_path))
    assert "locality_hard" not in {q.split for q in stream.questions(event)}


def test_the_order_of_the_file_does_not_matter(tmp_path: Path) -> None:
    make_folder(tmp_path, list(range(1005, 1405, 10)))
    before = OkeditYearly(StreamConfig(data_root=tmp_path)).events(60)
    top = json.loads((tmp_path / ANNOTATIONS).read_text())
    top["annotations"].reverse()
    (tmp_path / ANNOTATIONS).write_text(json.dumps(top))
    assert OkeditYearly(StreamConfig(data_root=tmp_path)).events(60) == before


def test_after_a_retire_the_old_answer_is_right_again(tmp_path: Path) -> None:
    make_folder(tmp_path, list(range(1005, 1405, 10)))
    stream = OkeditYearly(StreamConfig(data_root=tmp_path, retire=0.3))
    retired = [e for e in stream.events(100) if e.kind == "retire"]
    assert len(retired) > 5
    for event in retired:
        by_split = {q.split: q for q in stream.questions(event)}
        assert by_split["edit"].answer == by_split["text_generality"].answer == "dog"
        assert by_split["stale"].answer == event.previous != "dog"


def test_two_answers_to_one_question_are_no_belief(tmp_path: Path) -> None:
    """Two questions of one photo share a train paraphrase and differ in their answers: a model can hold neither."""
    make_folder(tmp_path, [1000, 1001, 1025])
    questions = json.loads((tmp_path / QUESTIONS).read_text())
    for row in questions["questions"]:
        row["rephrased_questions_train"] = ["Name it.", f"Name {row['question_id']}."]
    (tmp_path / QUESTIONS).write_text(json.dumps(questions))
    top = json.loads((tmp_path / ANNOTATIONS).read_text())
    top["annotations"][1]["answers"] = [{"answer": "wolf"}]
    (tmp_path / ANNOTATIONS).write_text(json.dumps(top))
    beliefs = list(OkeditYearly(StreamConfig(data_root=tmp_path)).beliefs())
    assert [q.answer for q in beliefs if q.prompt == "Name it."] == ["dog"]
    assert sorted(q.prompt for q in beliefs if q.answer == "wolf") == ["Name 1001.", "What animal is number 1001?"]


def test_a_copied_photo_with_the_same_question_is_one_fact(tmp_path: Path) -> None:
    make_folder(tmp_path, [1005, 1015, 1025])
    photos = [tmp_path / "val2014" / f"COCO_val2014_{i:012d}.jpg" for i in (100, 101)]
    photos[1].write_bytes(photos[0].read_bytes())
    questions = json.loads((tmp_path / QUESTIONS).read_text())
    for row in questions["questions"]:
        row["question"] = "What is it?"
    (tmp_path / QUESTIONS).write_text(json.dumps(questions))
    stream = OkeditYearly(StreamConfig(data_root=tmp_path))
    assert [s.reason for s in stream.skipped] == ["the same question about the same photo stands in an earlier record"]
    assert "question 1015" in stream.skipped[0].where


def test_without_a_photo_there_is_no_question_about_it(tmp_path: Path) -> None:
    make_folder(tmp_path, [q for i in range(1000, 1400, 10) for q in (i, i + 1)])
    shutil.rmtree(tmp_path / "val2014")
    stream = OkeditYearly(StreamConfig(data_root=tmp_path, missing_images="text"))
    asked = [q for e in stream.events(60) for q in stream.questions(e)]
    assert {q.split for q in asked} == {"edit", "text_generality", "stale", "locality_far"}
    assert all(q.image is None for q in asked)


def test_every_photo_with_two_questions_has_a_sibling_control(tmp_path: Path) -> None:
    make_folder(tmp_path, [q for i in range(1000, 1400, 10) for q in (i, i + 1)])
    edit_answers = json.loads((tmp_path / ANNOTATIONS).read_text())
    for row in edit_answers["annotations"]:
        row["answers"] = [{"answer": f"animal {row['question_id']}"}]
    (tmp_path / ANNOTATIONS).write_text(json.dumps(edit_answers))
    stream = OkeditYearly(StreamConfig(data_root=tmp_path))
    events = stream.events(40)
    for event in events:
        siblings = [q for q in stream.questions(event) if q.split == "locality_sibling"]
        assert len(siblings) == 1
        assert siblings[0].image is not None
        assert siblings[0].image.key == (event.image.key if event.image else "")
        assert siblings[0].prompt != event.prompt


def test_a_paraphrase_that_is_another_edited_question_about_the_photo_is_not_asked(tmp_path: Path) -> None:
    """Its answer would be the other edit's target."""
    make_folder(tmp_path, [q for i in range(1000, 1400, 10) for q in (i, i + 1, i + 2)])
    questions = json.loads((tmp_path / QUESTIONS).read_text())
    for row, other in zip(questions["questions"], [*questions["questions"][1:], None]):
        if other and row["image_id"] == other["image_id"]:
            row["rephrased_questions"].append(other["question"])
    (tmp_path / QUESTIONS).write_text(json.dumps(questions))
    stream = OkeditYearly(StreamConfig(data_root=tmp_path))
    edited = {(e.image.key, e.prompt) for e in stream.events(10**6) if e.image}
    asked = [q for e in stream.events(60) for q in stream.questions(e) if q.split == "text_generality"]
    assert asked
    assert not edited & {(q.image.key, q.prompt) for q in asked if q.image}


# the real files ----------------------------------------------------------------------------------------------


def card_counts() -> dict[str, dict[str, int]]:
    """The card's table of counts: split name to column to number."""
    rows = [line.strip("| ").split("|") for line in CARD.read_text().splitlines() if line.startswith("|")]
    head = [c.strip() for c in rows[0]]
    return {r[0].strip(): {h: int(re.sub(r"\D", "", v)) for h, v in zip(head[1:], r[1:])} for r in rows[2:]}


@pytest.fixture(params=["val2014", "train2014"])
def real(request: pytest.FixtureRequest, data_root: Path) -> OkeditYearly:
    return OkeditYearly(StreamConfig(data_root=data_root / "okedit_form" / request.param))


def _counted(stream: OkeditYearly) -> tuple[str, dict[str, Any]]:
    source = stream
    assert isinstance(source, OkeditFiles)
    entries = source._data.entries
    asked = Counter(q.split for e in stream.events(500) for q in stream.questions(e))
    counts = {
        "records": source._total,
        "usable": len(entries),
        "edited": sum(e.role == "edit" for e in entries),
        "asked as controls": len(stream.general()),
        "in the train pool": sum(e.role == "train" for e in entries),
        "most edits": len(stream.events(10**6)),
        "hard locality of 500": asked["locality_hard"],
    }
    return entries[0].source.split()[1], counts


def test_the_card_counts_what_the_files_hold(real: OkeditYearly) -> None:
    split, counts = _counted(real)
    assert card_counts()[split] == counts
    assert not real.skipped


def test_five_hundred_edits_fit(real: OkeditYearly) -> None:
    events = real.events(500)
    assert len(events) == 500
    assert events[-1].year == 10
    kinds = Counter(e.kind for e in events)
    assert kinds["add"] >= 300
    assert min(kinds.values()) > 0
    by_split = Counter(q.split for e in events for q in real.questions(e))
    assert by_split["edit"] == by_split["stale"] == by_split["locality_far"] == 500
    assert by_split["text_generality"] == by_split["image_generality"] == 1000
    assert all(q.answer for e in events[:50] for q in real.questions(e))
    assert all(len(real.paraphrases(e)) == 3 for e in events)


def test_real_photos_decode_and_differ(real: OkeditYearly) -> None:
    events = [e for e in real.events(60) if e.kind == "add" and e.image is not None]
    assert len(events) > 30
    assert len({e.image.key for e in events if e.image}) == len(events)
    for event in events[:8]:
        pictures = [q.image for q in real.questions(event) if q.image is not None]
        assert all(min(p.load().shape[:2]) > 50 for p in pictures)


def test_real_controls_are_never_edited(real: OkeditYearly) -> None:
    edited = {(e.image.key, e.prompt) for e in real.events(10**6) if e.image}
    kept = [q for e in real.events(10**6) for q in real.questions(e) if q.split.startswith("locality")]
    assert kept
    assert not edited & {(q.image.key, q.prompt) for q in (*kept, *real.general(), *real.train_pool().questions) if q.image}


def test_the_beliefs_of_the_real_files_agree(real: OkeditYearly) -> None:
    beliefs = list(real.beliefs())
    keys = {(q.image.key if q.image else "", normalize(q.prompt)) for q in beliefs}
    assert len(keys) == len(beliefs)
    known = {(q.image.key if q.image else "", q.prompt): q.answer for q in beliefs}
    adds = [e for e in real.events(300) if e.kind == "add"]
    assert all(known[(e.image.key, e.prompt)] == e.previous for e in adds if e.image)


def test_one_level_too_high_lists_both_splits(data_root: Path) -> None:
    from streams.base import BadStream

    with pytest.raises(BadStream, match=r"one level too high.*train2014.*val2014"):
        OkeditYearly(StreamConfig(data_root=data_root / "okedit_form"))
