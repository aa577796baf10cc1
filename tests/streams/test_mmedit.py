"""MMEdit and VLKEB files: fields, picture policies, what is skipped by name, the real files' counts as the cards say them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streams.base import BadStream, Stream, StreamConfig
from testbed.core.events import check_order
from testbed.core.registry import STREAMS
from tests.helpers.okedit_folder import paint

CARDS = Path(__file__).parents[2] / "streams" / "cards"
NAME = "val2014/COCO_val2014_{:012d}.jpg"


def record(i: int, picture: int) -> dict[str, Any]:
    return {
        "src": f"What is thing {i}?",
        "pred": f"old {i}",
        "alt": f"new {i}",
        "rephrase": f'"Which thing is {i}?"',
        "image": NAME.format(picture),
        "image_rephrase": f"val2014_image_rephrase/{i}.png",
        "loc": f"nq question: who was number {i}",
        "loc_ans": f"person {i}",
        "m_loc": NAME.format(9000 + i),
        "m_loc_q": f"What else is {i}?",
        "m_loc_a": f"else {i}",
        "rephrased_questions_train": [f"Name thing {i}."],
    }


def folder(root: Path, rows: list[Any], pictures: bool = True) -> Path:
    (root / "vqa").mkdir(parents=True, exist_ok=True)
    (root / "vqa" / "vqa_eval.json").write_text(json.dumps(rows))
    for i in {r["image"] for r in rows if isinstance(r, dict) and isinstance(r.get("image"), str)} if pictures else ():
        paint(root / "images" / i, sum(map(ord, i)))
    return root


def stream(root: Path, **config: Any) -> Stream:
    return STREAMS.get("mmedit-yearly")(StreamConfig(data_root=root, **config))


def splits(s: Stream) -> set[str]:
    return {q.split for e in s.events(200) for q in s.questions(e)}


ROWS = [record(i, i // 2) for i in range(60)]


def test_every_split_of_the_paper_is_asked_where_its_picture_is(tmp_path: Path) -> None:
    root = folder(tmp_path, ROWS)
    assert splits(stream(root)) == {"edit", "stale", "text_generality", "locality_text", "locality_sibling"}
    for r in ROWS:
        paint(root / r["image_rephrase"], 7)
        paint(root / "images" / r["m_loc"], 9)
    s = stream(root)
    assert splits(s) == {"edit", "stale", "text_generality", "image_generality", "locality_text", "locality_far", "locality_sibling"}
    event = next(e for e in s.events(200) if e.kind == "add")
    asked = {q.split: q for q in s.questions(event)}
    number = event.prompt.split()[-1].rstrip("?")
    assert asked["text_generality"].prompt == f"Which thing is {number}?"
    assert (asked["locality_text"].prompt, asked["locality_text"].answer) == (f"who was number {number}", f"person {number}")
    assert s.paraphrases(event) == (f"Name thing {number}.",)
    assert s.manifest()["missing_images"] == {"image": 0, "image_rephrase": 0, "m_loc": 0}


def test_policies_for_absent_pictures(tmp_path: Path) -> None:
    rows = [*ROWS, record(60, 77), record(61, 78) | {"caption": "a red door"}, record(62, 79) | {"src": ROWS[0]["src"]}]
    root = folder(tmp_path, ROWS)
    folder(root, rows, pictures=False)
    skip, text, caption = (stream(root, missing_images=p) for p in ("skip", "text", "caption"))
    assert [len(s.skipped) for s in (skip, text, caption)] == [3, 0, 2]
    assert skip.manifest()["missing_images"]["image"] == 3
    assert {k.reason for k in skip.skipped} == {"no file for image"}
    assert any(q.prompt == "Picture: a red door. What is thing 61?" and q.image is None for q in caption.beliefs())
    assert len({s.data_hash() for s in (skip, text, caption)}) == 3


def test_train_paraphrases_come_from_the_file_beside(tmp_path: Path) -> None:
    rows = [{k: v for k, v in r.items() if k != "rephrased_questions_train"} for r in ROWS]
    root = folder(tmp_path, rows)
    assert not any(stream(root).paraphrases(e) for e in stream(root).events(20))
    (root / "vqa" / "vqa_eval_balancedit.json").write_text(json.dumps(ROWS))
    s = stream(root)
    assert all(s.paraphrases(e) for e in s.events(20))
    assert "60 usable of 60" in s.origin


def test_the_path_of_the_folder_does_not_matter(tmp_path: Path) -> None:
    one, two = stream(folder(tmp_path / "a", ROWS)), stream(folder(tmp_path / "b" / "deep", ROWS))
    assert one.data_hash() == two.data_hash()
    assert one.stream_hash(one.events(90)) == two.stream_hash(two.events(90))
    assert one.origin == two.origin


ONE = {
    "empty target": ({"alt": " "}, "alt is empty"),
    "no target": ({"alt": None}, "alt is null"),
    "target as before": ({"alt": "The OLD 3."}, "alt equals pred"),
    "question a list": ({"src": []}, "src is empty"),
    "picture a number": ({"image": 5}, "no file for image"),
    "picture outside": ({"image": "../../etc/passwd.jpg"}, "leaves the folder"),
    "paraphrase a number": ({"loc": {}}, "loc must be text, found an object"),
}


@pytest.mark.parametrize("name", list(ONE))
def test_a_bad_record_is_skipped_and_named(tmp_path: Path, name: str) -> None:
    change, reason = ONE[name]
    root = folder(tmp_path, [r | change if i == 3 else r for i, r in enumerate(ROWS)])
    s = stream(root)
    assert [k.where for k in s.skipped] == ["vqa_eval.json record 3"]
    assert reason in s.skipped[0].reason
    check_order(s.events(100))


def test_entities_are_unescaped_and_copies_left_out(tmp_path: Path) -> None:
    rows = [*ROWS, *[ROWS[5]] * 1000, record(70, 70) | {"alt": "salt &amp; pepper"}, "text"]
    s = stream(folder(tmp_path, rows))
    assert len(s.skipped) == 1001
    assert any(e.target == "salt & pepper" for e in s.events(300)) or any("salt" in str(e) for e in s._data.entries)  # pyright: ignore


@pytest.mark.parametrize(
    ("content", "message"), [(b'[{"src": "a', "cut short"), (b'"x"', "expected a list"), (b"[\xff", "UTF-8"), (b"[]", "none")]
)
def test_a_broken_file_is_refused_with_its_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "vqa_eval.json").write_bytes(content)
    with pytest.raises(BadStream, match=message):
        stream(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(field=st.sampled_from([*ROWS[0], "caption", "port_new"]), value=JSON, policy=st.sampled_from(["skip", "text", "caption"]))
def test_any_value_may_have_any_type(tmp_path: Path, field: str, value: Any, policy: str) -> None:
    root = folder(tmp_path, ROWS[:12])
    folder(root, [r | {field: value} if i % 3 == 0 else r for i, r in enumerate(ROWS[:12])], pictures=False)
    s = stream(root, missing_images=policy)
    for e in s.events(20):
        assert all(q.event_id == e.id for q in s.questions(e))
        assert isinstance(s.paraphrases(e), tuple)
    assert all(q.answer for q in (*s.general(), *s.train_pool().questions, *s.beliefs()))
    assert s.manifest()["skipped"] == len(s.skipped)


@pytest.mark.parametrize(
    ("name", "folder_name", "policy"),
    [
        ("mmedit-yearly", "mmedit", "skip-absent"),
        ("mmedit-yearly", "mmedit", "text"),
        ("mmedit-caption-yearly", "mmedit", "skip-absent"),
        ("mmedit-caption-yearly", "mmedit", "caption"),
        ("vlkeb-yearly", "vlkeb", "text"),
    ],
)
def test_the_card_says_what_the_files_give(name: str, folder_name: str, policy: Any, data_root: Path) -> None:
    s = STREAMS.get(name)(StreamConfig(data_root=data_root / folder_name, missing_images=policy))
    usable, total = s.origin.partition("(")[2].split(" usable of ")
    never = s.origin.rpartition(", ")[2].split(" of them")[0]
    row = f"| {policy} | {total.split(' ')[0]} | {usable} | {never} | {len(s.events(10**6)):,} |"
    assert row in (CARDS / f"{name}.md").read_text(encoding="utf-8")
    total_records = int(total.split(" ")[0].replace(",", ""))
    assert len(s.skipped) == total_records - int(usable.replace(",", ""))
    missing = s.manifest()["missing_images"]
    if name == "mmedit-yearly":
        assert missing == {"image": 7775, "image_rephrase": 7915, "m_loc": 7322}
