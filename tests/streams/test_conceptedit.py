"""ConceptEdit and DocMEdit on written files: what is asked, what the sources lack, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from streams.base import BadStream, Stream, StreamConfig
from streams.files.concepts import DEMONSTRATIONS
from testbed.core.events import Question
from testbed.core.registry import STREAMS
from tests.helpers.written_files import WRITTEN

N = 40
CONCEPTS, ARTICLES = "conceptedit-yearly", "docmedit-yearly"


def stream(root: Path, name: str, *changes: dict[str, Any], **config: Any) -> Stream:
    """The stream on N written rows, the last ones with these changes."""
    rows = [WRITTEN[name].row(i) for i in range(N)]
    rows = [*rows[: N - len(changes)], *(row | change for row, change in zip(rows[N - len(changes) :], changes))]
    (root / WRITTEN[name].file).write_text(json.dumps(rows))
    return STREAMS.get(name)(StreamConfig(data_root=root, **config))


def by_split(s: Stream, split: str) -> dict[str | None, Question]:
    """The questions of a split about every edit, by the edit's subject."""
    return {e.subject: q for e in s.events(10**6) for q in s.questions(e) if q.split == split}


def test_an_instance_must_leave_a_concept_that_gets_another_definition(tmp_path: Path) -> None:
    s = stream(tmp_path, CONCEPTS)
    event = s.events(1)[0]
    i = int((event.subject or "").removeprefix("craft "))
    asked = {q.split: (q.prompt, q.answer) for q in s.questions(event)}
    assert event.target == f"a large boat with {i} masts that carries grain"
    assert asked["instance_follow"] == (f"{DEMONSTRATIONS}Whether Weaving {i} belongs to category craft {i}?", "No")
    assert asked["text_generality"] == (f"The meaning of craft {i} is", event.target)
    assert asked["locality_hard"] == (f"Definition of trade {i} is", f"the exchange of goods of kind {i}")
    assert "locality_far" in asked and "stale" not in asked


def test_several_instances_are_asked_and_those_of_another_concept_are_counted(tmp_path: Path) -> None:
    prompts = ["Whether Oak belongs to category craft 39?", "Whether Weaving belongs to category CRAFT 39?", "Whether it is a ship?"]
    s = stream(tmp_path, CONCEPTS, {"instance_prompt": prompts})
    assert s.manifest()["read"]["instance_follow"] == N + 1
    assert s.manifest()["passed_over"] == {"instance_prompt names another concept": 1}


NO_INSTANCE = "instance_prompt asks about no instance of label: without one nothing shows whether instances follow"
SKIPPED = {
    "no instances": ({"instance_prompt": []}, NO_INSTANCE),
    "an empty instance": ({"instance_prompt": " "}, NO_INSTANCE),
    "instances of another": ({"instance_prompt": "Whether Oak belongs to category tree?"}, NO_INSTANCE),
    "instances as an object": ({"instance_prompt": {"a": 1}}, "instance_prompt must be text, found an object"),
    "no definition": ({"target_new_desc": None}, "target_new_desc is null"),
    "no concept": ({"label": ""}, "label is empty"),
    "the same prompt": ({"prompt": "Definition of craft 2 is"}, "the same prompt stands in an earlier record"),
}


@pytest.mark.parametrize("name", list(SKIPPED))
def test_a_concept_that_cannot_be_used_is_skipped_and_named(tmp_path: Path, name: str) -> None:
    change, reason = SKIPPED[name]
    s = stream(tmp_path, CONCEPTS, change)
    assert [(k.where, k.reason) for k in s.skipped] == [(f"final_gptj_inter.json record {N - 1}", reason)]


def test_files_of_several_models_are_not_mixed(tmp_path: Path) -> None:
    stream(tmp_path, CONCEPTS)
    (tmp_path / "final_gptj_intra.json").write_text("[]")
    with pytest.raises(BadStream, match=r"holds final_gptj_inter.json, final_gptj_intra.json, .* give one file as --data-root"):
        STREAMS.get(CONCEPTS)(StreamConfig(data_root=tmp_path))
    assert STREAMS.get(CONCEPTS)(StreamConfig(data_root=tmp_path / "final_gptj_inter.json")).events(1)


def test_an_article_is_known_before_its_update(tmp_path: Path) -> None:
    s = stream(tmp_path, ARTICLES, revise=0.4, retire=0.2)
    event = s.events(1)[0]
    i = int((event.subject or "").removeprefix("Ann "))
    before = f"Ann {i} is a painter. She lives in Oldtown {i} and works for Firm {i}. She has shown her pictures in twelve cities."
    assert event.previous == before and event.target == before.replace("Oldtown", "Newtown").replace("twelve", "forty")
    beliefs = {q.prompt: q.answer for q in s.beliefs()}
    assert beliefs[event.prompt] == before == by_split(s, "stale")[event.subject].answer
    assert {e.kind for e in s.events(10**6)} == {"add"} and s.train_pool().edits and s.train_pool().texts
    assert all("Oldtown" in q.prompt for q in s.general()) and s.manifest()["passed_over"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalized_targets": WRITTEN[ARTICLES].row(N - 1)["normalized_inputs"]}, "normalized_targets equals normalized_inputs"),
        ({"normalized_inputs": ""}, "normalized_inputs is empty"),
        ({"title": []}, "title is empty"),
        ({"title": ["Ann_2"]}, "the same title stands in an earlier record"),
    ],
)
def test_an_article_that_cannot_be_used_is_skipped_and_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    s = stream(tmp_path, ARTICLES, change)
    assert [k.where for k in s.skipped] == [f"docmedit.jsonl record {N - 1}"] and s.skipped[0].reason.startswith(reason)


@pytest.mark.parametrize("name", [CONCEPTS, ARTICLES])
def test_another_file_is_refused_with_its_fields(tmp_path: Path, name: str) -> None:
    (tmp_path / WRITTEN[name].file).write_text('[{"a": 1}]')
    with pytest.raises(BadStream, match=r"expected records with .*; found the fields a"):
        STREAMS.get(name)(StreamConfig(data_root=tmp_path))
