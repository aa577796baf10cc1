"""Files that somebody else wrote run no code, open nothing outside their folder, and stay text in a page."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from analysis.reporting.report import write_all
from streams.base import StreamConfig
from streams.files.pictures import FilePicture
from testbed.benchmarks.files import BadBenchmark, BenchmarkConfig
from testbed.benchmarks.files import load as load_benchmarks
from testbed.core.events import BadPicture
from testbed.core.registry import STREAMS
from tests.helpers.fake_run import Plan, event, fake_run, question, record, write_run
from tests.helpers.okedit_folder import ANNOTATIONS, QUESTIONS, make_folder, paint

ROOT = Path(__file__).parent.parent
FILES = sorted(p for name in ("testbed", "streams", "analysis") for p in (ROOT / name).rglob("*.py"))
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CODE = {"eval", "exec", "compile", "__import__"}
OUTSIDE = ("../secret.png", "a/../../secret.png", "/etc/hostname", "C:/secret.png", "..\\secret.png")


def calls(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Every call in a file: what is called, and its keyword arguments as source."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg or "**": ast.unparse(k.value) for k in node.keywords}


def risky(name: str, given: dict[str, str]) -> bool:
    """Whether a call may run what a file says."""
    last = name.rpartition(".")[2]
    return (
        (name == "torch.load" and given.get("weights_only") != "True")
        or (name.startswith("yaml.") and last in ("load", "load_all", "unsafe_load", "full_load"))
        or (last == "load" and given.get("allow_pickle", "False") != "False")
        or last in ("read_pickle", "set_default_tensor_type", "load_from_hub")
        or name in CODE
        or given.get("trust_remote_code", "False") != "False"
        or given.get("shell", "False") != "False"
    )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_that_is_read_is_run(path: Path) -> None:
    assert [name for name, given in calls(path) if risky(name, given)] == []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    named |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not named & UNPICKLERS


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("torch.load(p)", True),
        ("torch.load(p, weights_only=True)", False),
        ("yaml.load(f)", True),
        ("yaml.safe_load(f)", False),
        ("np.load(p, allow_pickle=True)", True),
        ("load_dataset(n, trust_remote_code=True)", True),
        ("eval(text)", True),
        ("model.eval()", False),
    ],
)
def test_the_search_finds_what_it_looks_for(code: str, found: bool, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(code)
    assert next(risky(name, given) for name, given in calls(tmp_path / "a.py")) == found


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_picture_of_ones_own_records_stays_in_their_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    paint(tmp_path / "secret.png", 3)
    paint(tmp_path / "data" / "here.png", 4)
    rows = [{"prompt": f"Who owns {i}?", "target": f"Ann {i}", "image": "here.png"} for i in range(40)]
    rows[5]["image"] = name
    (tmp_path / "data" / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stream = STREAMS.get("jsonl:own.jsonl")(StreamConfig(data_root=tmp_path / "data"))
    assert [(s.where, "leaves the folder" in s.reason) for s in stream.skipped] == [("record 5", True)]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_picture_of_a_benchmark_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    paint(tmp_path / "secret.png", 3)
    (tmp_path / "data" / "vqa.jsonl").write_text(json.dumps({"image": name, "question": "What?", "answer": "a cat"}))
    with pytest.raises(BadBenchmark, match="leaves the folder"):
        load_benchmarks([tmp_path / "data" / "vqa.jsonl"], BenchmarkConfig())


def test_numbers_of_okedit_that_are_paths_open_nothing(tmp_path: Path) -> None:
    """Its pictures are named by numbers in the records; text in their place is a bad record."""
    root = make_folder(tmp_path / "okedit", list(range(100, 500, 10)))
    paint(tmp_path / "secret.jpg", 9)
    for file, key in ((ANNOTATIONS, "annotations"), (QUESTIONS, "questions")):
        top = json.loads((root / file).read_text())
        top[key][0]["image_id"] = "../../secret"
        (root / file).write_text(json.dumps(top))
    stream = STREAMS.get("okedit-yearly")(StreamConfig(data_root=root))
    assert any("image_id" in s.reason for s in stream.skipped)
    names = [e.image.name for e in stream.events(30) if isinstance(e.image, FilePicture)]
    assert names and all(".." not in n for n in names)


def test_a_name_that_leaves_its_folder_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    paint(tmp_path / "secret.png", 3)
    for name in OUTSIDE:
        with pytest.raises(BadPicture, match="leaves the folder"):
            FilePicture(tmp_path / "data", name).load()


EVIL = "\"><script>alert(1)</script><img src=x onerror=alert(2)>'"
QUIET_TAGS = {"script", "iframe", "object", "embed", "link", "base", "form"}


class Page(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(k, v or "") for k, v in attrs]


def test_hostile_text_in_records_stays_text_in_the_report(tmp_path: Path) -> None:
    """In ids, prompts, targets, answers, topics, reasons and notes; the page has the tags that it has without."""
    plain, hostile = (_report(tmp_path / name, text) for name, text in (("plain", "word"), ("hostile", EVIL)))
    assert "&lt;script&gt;" in hostile
    a, b = Page(plain), Page(hostile)
    assert sorted(set(a.tags)) == sorted(set(b.tags))
    assert a.tags.count("script") == b.tags.count("script")
    assert not [k for k, v in b.attributes if k.startswith("on") or v.strip().lower().startswith("javascript:")]


def _report(out: Path, text: str) -> str:
    events = [event(i, i + 1, prompt=f"{text} {i}", target=text, relation=text, subject=text, source=text) for i in range(3)]
    questions = [question(f"q{i}", f"e{i}", prompt=f"{text} {i}", answer=text, topic=text) for i in range(3)]
    questions.append(question("g", None, "general", prompt=text, answer=text, topic=text))
    rows = [
        record(edit_id=f"e{i}", edit_step=i + 1, edit_time=0.0, probe_step=3, probe_time=0.0, question_id=f"q{i}", exact=i > 0, n_tokens=1,
               token_hits=1, logprob=-1.0, generated=text, answer=text, target=text, topic=text, base_answer=text)
        for i in range(3)
    ]  # fmt: skip
    rows.append(record(split="general", topic=text, probe_step=3, probe_time=0.0, question_id="g", exact=True, generated=text, answer=text))
    stream = {"name": text, "origin": text, "time_axis": "simulated", "licence": text, "skipped": 1, "skipped_records": [text],
              "skipped_by_reason": {text: 1}}  # fmt: skip
    write_run(out, events, questions, {"noop": rows}, notes=[text], stream=stream, model={"name": text})
    write_all([out], replicates=50)
    return (out / "report.html").read_text(encoding="utf-8")


def test_hostile_notes_of_a_whole_run_stay_text(tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", Plan(edits=24, years=2, panel=8, editors=("noop",)), notes=[EVIL])
    write_all([folder], replicates=50)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in text and "<script>alert" not in text and "&lt;script&gt;alert(1)" in text
