"""Suites of benchmarks: from files under the data root, and from datasets of the hub's form in their absence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pyarrow import Table

from testbed.benchmarks.files import SUITES, BadBenchmark, BenchmarkConfig, load
from testbed.core.events import Question


def shape(q: Question) -> tuple[Any, ...]:
    return q.topic, q.prompt, q.choices, q.answer, q.scoring


def test_a_suite_is_found_by_the_names_of_its_files_and_says_what_is_absent(tmp_path: Path) -> None:
    item = {"query": "two and two", "choices": ["four", "five"], "gold": 0}
    with pytest.raises(
        BadBenchmark, match=r"--benchmarks default: give with --data-root(.|\n)*piqa is left out, because no --data-root is given"
    ):
        load([Path("default")], BenchmarkConfig())
    with pytest.raises(BadBenchmark, match=r"holds no \*\*/glue_eval/\*\*/sst2.json, and the hub gives none: it has no dataset of these"):
        load([Path("editing")], BenchmarkConfig(), tmp_path)
    found_at = tmp_path / "benchmarks" / "any" / "where"
    found_at.mkdir(parents=True)
    (found_at / "piqa.jsonl").write_text(json.dumps(item) + "\n", encoding="utf-8")
    (tmp_path / "benchmarks" / "wikitext-2").mkdir()
    (tmp_path / "benchmarks" / "wikitext-2" / "test.txt").write_text(" = Lobster = \n\n A lobster is large .\n", encoding="utf-8")
    found = load([Path("default")], BenchmarkConfig(), tmp_path)
    assert [b.topic for b in found.every] == ["bench:piqa", "bench:wikitext2"]
    assert [line.partition(" is left out")[0] for line in found.skipped] == [
        f"suite default: {name}" for name in ("arc_easy", "boolq", "lambada", "winogrande", "mmlu")
    ]


ON_HUB: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "arc_easy": ({"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["A", "B"]}, "answerKey": "B"},
                 ("bench:arc_easy", "Question: Hot?", ("ice", "fire"), "fire", "sum")),
    "piqa": ({"goal": "Open a jar", "sol1": "turn", "sol2": "push", "label": 0},
             ("bench:piqa", "Question: Open a jar", ("turn", "push"), "turn", "sum")),
    "boolq": ({"question": "is it large", "passage": "A lobster is large.", "idx": 0, "label": 1},
              ("bench:boolq", "Passage: A lobster is large.\nQuestion: is it large?", ("no", "yes"), "yes", "sum")),
    "lambada": ({"text": "He gave me a sign"}, ("bench:lambada", "He gave me a", (), "sign", "generate")),
    "winogrande": ({"sentence": "Ann met Bea, so _ waved.", "option1": "Ann", "option2": "Bea", "answer": "2"},
                   ("bench:winogrande", "Ann met Bea, so Ann waved.", ("Ann met Bea, so Ann waved.", "Ann met Bea, so Bea waved."),
                    "Ann met Bea, so Bea waved.", "text")),
    "mmlu": ({"question": "2 + 2?", "choices": ["3", "4"], "answer": 1, "subject": "sums"},
             ("bench:mmlu", "2 + 2?\nA. 3\nB. 4\nAnswer:", ("A", "B"), "B", "sum")),
    "wikitext2": ({"text": " A lobster is large . \n"}, ("bench:wikitext2", "A lobster is large .", (), None, "generate")),
}  # fmt: skip


def dataset_folder(record: dict[str, Any], source: dict[str, Any]) -> None:
    """A dataset of the hub's form in a folder of its name, which `datasets` reads in the place of the hub."""
    folder, config = Path(source["dataset"]), source.get("config", "default")
    pa_table = Table.from_pylist([record, *([{"text": " = Lobster = \n"}] if source["dataset"].endswith("wikitext") else [])])
    folder.mkdir(parents=True)
    pq.write_table(pa_table, folder / "rows.parquet")
    files = f"  data_files:\n  - split: {source['split']}\n    path: rows.parquet\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n{files}---\n", encoding="utf-8")


def test_without_files_a_suite_is_read_from_the_hub_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, (record, _) in ON_HUB.items():
        dataset_folder(record, SUITES["default"][name])
    found = load([Path("default")], BenchmarkConfig())
    assert [shape(b.questions[0]) for b in found.every] == [want for _, want in ON_HUB.values()]
    assert found.skipped == () and len(found.notes) == len(ON_HUB)
    assert found.notes[0] == "suite default: arc_easy is read from the hub's allenai/ai2_arc (ARC-Easy, test)"


def test_a_wrong_record_of_the_hub_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    dataset_folder(ON_HUB["winogrande"][0] | {"sentence": "No blank."}, SUITES["default"]["winogrande"])
    with pytest.raises(BadBenchmark, match=r"allenai/winogrande\[0\]: sentence must have one blank"):
        load([Path("default")], BenchmarkConfig())


def test_the_suites_are_complete_on_the_real_files(data_root: Path) -> None:
    for suite, names in SUITES.items():
        found = load([Path(suite)], BenchmarkConfig(items=8), data_root)
        assert [b.topic for b in found.every] == [f"bench:{name}" for name in names]
        assert all(len(b.questions) == 8 for b in found.every) and not any("suite" in line for line in found.skipped)
