"""Every loader over files with a byte cut, changed or dropped, or a value of another type: it is refused with a
message that names the file, or used, the bad records named; nothing else may be raised."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streams.base import BadStream, Stream, StreamConfig
from testbed.core.events import check_order
from testbed.core.registry import STREAMS
from tests.helpers.okedit_folder import ANNOTATIONS, QUESTIONS, annotation, paint, question
from tests.helpers.real_files import own_record

HERE = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
N = 12


@dataclass(frozen=True)
class LoaderCase:
    """A stream and small files for it: name to records (JSON) or to text."""

    stream: str
    files: dict[str, Any]
    config: dict[str, Any] = field(default_factory=dict)
    pictures: tuple[str, ...] = ()


def each(make: Callable[[int], Any]) -> list[Any]:
    return [make(i) for i in range(N)]


def mmedit(i: int) -> dict[str, Any]:
    fields = {"src": f"What is {i}?", "pred": f"old {i}", "alt": f"new {i}", "rephrase": f"Which is {i}?", "image": f"v/{i}.jpg"}
    far = {"m_loc": "v/99.jpg", "m_loc_q": f"What else is {i}?", "m_loc_a": f"else {i}"}
    return fields | far | {"image_rephrase": f"r/{i}.png", "loc": f"nq question: who was {i}", "loc_ans": f"p {i}", "caption": f"thing {i}"}


def rome(i: int) -> dict[str, Any]:
    new, old = {"str": f"new {i}"}, {"str": f"old {i}"}
    rewrite = {"prompt": "The tongue of {} is", "subject": f"Ann {i}", "relation_id": "P1", "target_new": new, "target_true": old}
    return {"requested_rewrite": rewrite, "paraphrase_prompts": [f"Ann {i} speaks"], "neighborhood_prompts": [f"Bob {i} speaks"]}


def flat(i: int) -> dict[str, Any]:
    fields = {
        "prompt": f"Land of S{i}?",
        "target_new": f"n{i}",
        "ground_truth": [f"o{i}"],
        "subject": f"S{i}",
        "rephrase_prompt": f"S{i} is in",
    }
    port = {"Reasoning": [{"prompt": f"Capital of S{i}?", "ground_truth": [[f"c{i}"]]}]}
    return fields | {"portability": port, "locality": {"Rel": [{"prompt": f"Age of S{i}?", "ground_truth": "7"}]}}


def mend(i: int) -> dict[str, Any]:
    return {
        "subject": f"S{i}",
        "src": f"Where is S{i}?",
        "alt": f"n{i}",
        "answers": [f"o{i}"],
        "rephrase": f"S{i}?",
        "loc": "q",
        "loc_ans": "a",
    }


def post_edit(i: int) -> dict[str, Any]:
    return {"edit_id": i, "requested_rewrite": f"Where is Ann {i}?", "target_old": f"o{i}", "target_new": f"n{i}"}


def query(i: int) -> dict[str, Any]:
    return {"edit_id": i, "query": f"Ann {i}?", "query_type": "paraphrase", "query_target": f"n{i}"}


def dated(i: int) -> list[dict[str, Any]]:
    return [
        {"query": f"P{i} plays for _X_.", "answer": [{"name": f"{v}{i}"}], "date": y}
        for v, y in (("A", "2012"), ("B", "2015"), ("C", "2018"))
    ]


def athlete(i: int) -> dict[str, Any]:
    spans = [
        f"A{i} |S: +2001-01-00T00:00:00Z |E: +2004-05-06T00:00:00Z",
        f"B{i} |S: +2004-06-00T00:00:00Z |E: +2009-00-00T00:00:00Z",
        f"C{i} |S: +2010",
    ]
    return {"questions": {"generic": f"Who trains {i}?", "other": f"Trainer of {i}?"}, "answers": spans}


def corrected(i: int) -> str:
    asked = f"Ann {i},coach,Bob {i},Who coaches Ann {i}?,Cy {i},0.0,Whose coach is Ann {i}?,A. Cy {i}  B. Bob {i},B"
    return asked + f",Is Bob {i} the coach?,Is Cy {i} the coach?,Age of Ann {i}?,Whom does Bob {i} coach?,Land of Ann {i}'s coach?,Peru\n"


FACES = (
    "subject,relation,object,question,output_m,eval_m,paraphrased_question,multiple_choice_with_letters,multiple_choice_labels,"
    "yes_question,no_question,locality_question,reversed_relation_question,question_2hop,answer_2hop\n"
)
LEADERS = "ccode,leader,sdate,smonth,syear,emonth,eyear\n" + "".join(
    f"{code},L{code}{k},1,1,{1950 + 3 * k},1,{1953 + 3 * k}\n" for code in (2, 20, 40, 41, 42, 70, 90, 91, 92, 93, 94, 95) for k in range(3)
)
YAGO = {
    "triple2id.txt": "".join(f"{i}\t0\t{20 + k}\t{1990 + k}-##-##\t{1991 + k}-##-##\n" for i in range(N) for k in range(3)),
    "entity2id.txt": "".join(f"<E_{i}>\t{i}\n" for i in range(30)),
    "relation2id.txt": "<playsFor>\t0\n",
}
ASKED = range(1005, 1005 + 10 * N, 10)
OKEDIT = {
    ANNOTATIONS: {"annotations": [annotation(q) for q in ASKED], "question_types": {"one": "Animals &amp; co"}},
    QUESTIONS: {"questions": [question(q) for q in ASKED]},
}
PHOTOS = tuple(
    name
    for q in ASKED
    for name in (f"val2014/COCO_val2014_{q // 10:012d}.jpg", f"rephrased_images/{q}/0.png", f"locality_images_dalle2/{q}/0.webp")
)
FORMS = {
    "OKEDIT": LoaderCase("okedit-yearly", OKEDIT, pictures=PHOTOS),
    "E-VQA": LoaderCase("mmedit-yearly", {"vqa/vqa_eval.json": each(mmedit)}, pictures=tuple(f"v/{i}.jpg" for i in range(N))),
    "E-VQA, text": LoaderCase("mmedit-yearly", {"vqa_train.json": each(mmedit)}, {"missing_images": "text"}),
    "E-IC": LoaderCase("mmedit-caption-yearly", {"caption_eval_edit.json": each(mmedit)}, {"missing_images": "caption"}),
    "VLKEB": LoaderCase("vlkeb-yearly", {"train.json": each(mmedit)}, {"missing_images": "text"}),
    "CounterFact": LoaderCase("counterfact-yearly", {"counterfact.json": each(rome)}),
    "HalluEditBench": LoaderCase("hallueditbench-yearly", {"m/sport.csv": FACES + "".join(map(corrected, range(N)))}),
    "KnowEdit": LoaderCase("knowedit-yearly", {"test_cf.json": each(flat)}),
    "zsRE, MEND": LoaderCase("zsre-yearly", {"zsre_mend_eval.json": each(mend)}),
    "zsRE, postEdit": LoaderCase(
        "zsre-yearly",
        {
            "edit_data.json": each(post_edit),
            "query_data.json": each(query),
        },
    ),
    "TempLAMA": LoaderCase("templama", {"time_editing.json": each(dated)}),
    "DyKnow": LoaderCase("dyknow", {"qa_generated.json": {"athletes_byPayment": {f"X{i}": athlete(i) for i in range(N)}}}),
    "REIGN": LoaderCase("leaders", {"leaderlist_1.csv": LEADERS}),
    "YAGO": LoaderCase("yago", YAGO),
    "JSON lines": LoaderCase("jsonl:own.jsonl", {"own.jsonl": "\n".join(json.dumps(own_record(i)) for i in range(N))}),
    "a JSON list": LoaderCase("jsonl:own.json", {"own.json": each(own_record)}),
}  # fmt: skip


IN_JSON = [name for name, form in FORMS.items() if any(not isinstance(content, str) for content in form.files.values())]
IN_A_LIST = [name for name, form in FORMS.items() if isinstance(next(iter(form.files.values())), list)]


@pytest.fixture(scope="module", params=list(FORMS))
def form(request: pytest.FixtureRequest) -> LoaderCase:
    return FORMS[request.param]


@pytest.fixture(scope="module")
def root(form: LoaderCase, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    for name in form.files:
        write(folder, form, name, form.files[name])
    for i, name in enumerate(form.pictures):
        paint(folder / name, i)
    return folder


def write(folder: Path, form: LoaderCase, name: str, content: Any) -> bytes:
    raw = content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode()
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(raw)
    return raw


def check_use(root: Path, form: LoaderCase) -> Stream | None:
    """Everything that a run asks of a stream; None where it is refused with a message that says where."""
    s, message = None, ""
    try:
        s = STREAMS.get(form.stream)(StreamConfig(data_root=root, **form.config))
    except BadStream as e:
        message = str(e)
    if s is None:
        assert any(word in message for word in (str(root), form.stream, *(Path(name).name for name in form.files)))
        return None
    events = s.events(60)
    check_order(events)
    for e in events:
        assert all(q.event_id == e.id for q in s.questions(e))
        s.paraphrases(e)
    assert all(q.answer for q in (*s.general(), *s.train_pool().questions, *s.beliefs()))
    assert s.manifest()["skipped"] == len(s.skipped)
    assert all(k.where and k.reason for k in s.skipped)
    return s


def test_whole_files_are_read(root: Path, form: LoaderCase) -> None:
    s = check_use(root, form)
    assert s is not None
    assert len(s.events(100)) > N // 2


@HERE
@given(data=st.data())
def test_any_byte_may_be_cut_changed_or_dropped(root: Path, form: LoaderCase, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(form.files)))
    raw = (root / name).read_bytes()
    at = data.draw(st.integers(0, len(raw) - 1))
    byte = bytes([data.draw(st.integers(0, 255))])
    spoiled = data.draw(
        st.sampled_from([raw[:at], raw[:at] + byte + raw[at + 1 :], raw[:at] + raw[at + 1 :], raw[:at] + b"\xff\xfe" + raw[at:]])
    )
    try:
        write(root, form, name, spoiled)
        check_use(root, form)
    finally:
        write(root, form, name, raw)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(p for k, v in inner for p in paths(v, (*path, k)))]


ODD = st.sampled_from(
    ["", "  ", "&amp;", "\ud800", "<b>", "{}", "a\0b", "../x", "2014-13-41", "0000", "9" * 400, -1, 1e308, True, None, [], {}, [[]]]
)
JSON = st.recursive(
    ODD | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.parametrize("form", IN_JSON, indirect=True)
@HERE
@given(data=st.data())
def test_any_value_may_have_any_type(root: Path, form: LoaderCase, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([name for name, content in form.files.items() if not isinstance(content, str)]))
    raw = (root / name).read_bytes()
    top = json.loads(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(paths(top)[1:]))
        target = top
        for key in parents:
            target = target[key]
        target[last] = data.draw(JSON)
    try:
        write(root, form, name, top)
        check_use(root, form)
    finally:
        write(root, form, name, raw)


@pytest.mark.parametrize("form", IN_A_LIST, indirect=True)
def test_a_thousand_copies_are_left_out_by_name(root: Path, form: LoaderCase) -> None:
    name, content = next(iter(form.files.items()))
    try:
        write(root, form, name, content + [content[3]] * 1000)
        s = check_use(root, form)
    finally:
        write(root, form, name, content)
    assert s is not None
    assert len(s.skipped) >= 1000
    assert len(s.events(10**4)) < 100
