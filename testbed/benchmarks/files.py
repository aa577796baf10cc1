"""Benchmarks from local files: read and checked before a model is loaded, asked by the probe `benchmarks`.

A file is one benchmark, named by its stem; a folder holds one a file, and all its csv files without a header are
MMLU's subjects, pooled; a zip of JSON lines is one. A .txt file, named itself, is running text, a line each (WikiText).
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from testbed.benchmarks.formats import LETTERS, BadItem, Item, NoChoice, Place, item_of
from testbed.core.events import BadPicture, Question
from testbed.probes.base import Benchmark, draw

SUFFIXES = (".jsonl", ".json", ".csv", ".zip", ".txt")
_SPLITS = ("_test", "_dev", "_val", "_validation")


class BadBenchmark(ValueError):
    """A file that cannot be used: which, where, what was expected."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """Set by `--set benchmarks.field=value`."""

    items: int = 32
    """Questions of each benchmark, drawn by hash, the same at every moment; fewer where the budget shrinks panels."""
    shots: int = 0
    """Solved examples before each question; they are never asked themselves."""
    scoring: Literal["sum", "norm", "generate"] = "sum"
    """How a choice is made: log-probability; log-probability a character; or free generation of the choice's text."""

    def problems(self) -> list[str]:
        out = [f"items must be 1 or more, got {self.items}"] if self.items < 1 else []
        return out + ([f"shots must be 0 or more, got {self.shots}"] if self.shots < 0 else [])


def describe(benchmark: Benchmark) -> dict[str, Any]:
    """For the manifest. `chance` is the mean score of guessing: 0 for free generation, absent for refusals and running text."""
    questions = benchmark.questions
    scorings = sorted({q.scoring for q in questions})
    out = {"items": benchmark.size, "asked": len(questions), "shots": benchmark.shots, "scoring": ", ".join(scorings)}
    if not {"refuse", "comply"} & {*scorings} and not any(q.split == "text" for q in questions):
        competing = [len({*q.choices} - {*q.aliases}) for q in questions]
        out["chance"] = sum(1 / n if n else 0 for n in competing) / len(questions)
    return out


@dataclass(frozen=True)
class Benchmarks:
    """A run's benchmarks, and the records that were left out, with place and reason."""

    every: tuple[Benchmark, ...] = ()
    skipped: tuple[str, ...] = ()


def load(paths: Sequence[Path], config: BenchmarkConfig) -> Benchmarks:
    """The benchmarks of these files and folders, in their order. Raises `BadBenchmark`."""
    found: dict[str, Benchmark] = {}
    origin: dict[str, Path] = {}
    skipped: list[str] = []
    for path in paths:
        for name, items in _read(path, skipped):
            if name in found:
                raise BadBenchmark(f"{path}: a benchmark {name!r} was read from {origin[name]} already; rename one of the files")
            found[name], origin[name] = _benchmark(name, items, config, path), path
    return Benchmarks(tuple(found.values()), tuple(skipped))


def _benchmark(name: str, items: Sequence[Item], config: BenchmarkConfig, path: Path) -> Benchmark:
    """Examples are the first items by draw that have an answer to show, questions the next."""
    unique = {(i.prompt, i.image, i.choices): i for i in items}.values()
    order = sorted(unique, key=lambda i: draw(0, "benchmark", name, i.prompt, *i.choices, i.image.name if i.image else ""))
    examples = [i for i in order if i.shown][: config.shots]
    chosen = {id(i) for i in examples}
    left = [i for i in order if id(i) not in chosen]
    if not left or (len(examples) < config.shots and any(i.shown for i in order)):
        raise BadBenchmark(f"{path}: {name} has {len(order)} items, too few for {config.shots} examples and a question")
    try:
        questions = tuple(_question(name, i, examples, config) for i in left[: config.items])
    except BadPicture as e:
        raise BadBenchmark(f"{path}: {e}") from e
    return Benchmark(questions[0].topic, questions, len(left), len(examples))


def _question(name: str, item: Item, examples: Sequence[Item], config: BenchmarkConfig) -> Question:
    if item.scoring == "perplexity":
        return Question("text", item.prompt, topic=f"{item.kind}:{name}")
    scoring: Any = config.scoring if item.scoring == "choice" else item.scoring
    solved = "".join(f"{e.prompt} {e.answer}\n\n" for e in examples if item.shown)
    choices = item.choices if scoring != "generate" else ()
    topic = f"{item.kind}:{name}"
    return Question("general", solved + item.prompt, item.answer, None, item.image, item.aliases, topic, choices, scoring)


def _read(path: Path, skipped: list[str]) -> Iterator[tuple[str, list[Item]]]:
    """Benchmarks of a path, by name; what is left out is added to `skipped`."""
    if not path.exists():
        raise BadBenchmark(f"--benchmarks {path} does not exist")
    if path.is_file():
        yield _name(path), list(_items(path, skipped))
        return
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.suffix != ".txt")
    bare = [p for p in files if p.suffix == ".csv" and _bare(p)]
    for p in files:
        if p not in bare:
            yield _name(p), list(_items(p, skipped))
    if bare:
        yield "mmlu", [i for p in bare for i in _items(p, skipped)]
    if not files:
        raise BadBenchmark(f"--benchmarks {path} holds no {', '.join(SUFFIXES[:-1])} file")


def _name(path: Path) -> str:
    stem = path.stem.lower()
    return next((stem.removesuffix(s) for s in _SPLITS if stem.endswith(s)), stem)


def _items(path: Path, skipped: list[str]) -> Iterator[Item]:
    """Items of one file. Raises `BadBenchmark` with the file and the record's number."""
    place, n = Place(path.parent, _name(path)), 0
    for where, record in _records(path):
        n += 1
        try:
            yield item_of(record, place)
        except NoChoice as e:
            skipped.append(f"{where}: {e}")
        except BadItem as e:
            raise BadBenchmark(f"{where}: {e}") from e
    if not n:
        raise BadBenchmark(f"{path} holds no records")


def _records(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        if path.suffix == ".zip":
            yield from _zipped(path)
        elif path.suffix == ".csv":
            yield from _table(path)
        elif path.suffix == ".json":
            yield from _listed(path)
        elif path.suffix == ".txt":
            yield from _paragraphs(path)
        elif path.suffix == ".jsonl":
            yield from _lines(str(path), path.read_text(encoding="utf-8"))
        else:
            raise BadBenchmark(f"{path}: expected a file that ends in {', '.join(SUFFIXES)}")
    except (OSError, UnicodeDecodeError, zipfile.BadZipFile, csv.Error) as e:
        raise BadBenchmark(f"{path} cannot be read: {e}") from e


def _lines(name: str, text: str) -> Iterator[tuple[str, Any]]:
    for i, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON text may hold U+2028
        if line.strip():
            try:
                yield f"{name}:{i}", json.loads(line)
            except ValueError as e:
                raise BadBenchmark(f"{name}:{i} is not JSON: {e}") from e


def _zipped(path: Path) -> Iterator[tuple[str, Any]]:
    with zipfile.ZipFile(path) as z:
        for name in sorted(n for n in z.namelist() if n.endswith(".jsonl") and not Path(n).name.startswith(".")):
            yield from _lines(f"{path}!{name}", z.read(name).decode("utf-8"))


def _listed(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise BadBenchmark(f"{path} is not JSON: {e}") from e
    if not isinstance(records, list):
        raise BadBenchmark(f"{path} must hold a list of objects, found {type(records).__name__}")
    yield from ((f"{path}[{i}]", r) for i, r in enumerate(records))


def _paragraphs(path: Path) -> Iterator[tuple[str, Any]]:
    """Lines of running text; empty ones and WikiText's headings are no text."""
    for i, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip() and not line.strip().startswith("="):
            yield f"{path}:{i}", {"text": line}


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    """A csv with a header, or MMLU's six columns without one."""
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    if rows and _mmlu_row(rows[0]):
        for i, row in enumerate(rows, 1):
            if not _mmlu_row(row):
                raise BadBenchmark(f"{path}:{i}: expected a question, four choices and a letter from A to D, found {len(row)} columns")
            yield f"{path}:{i}", {"question": row[0], "choices": row[1:5], "answer": row[5]}
        return
    for i, row in enumerate(rows[1:], 2):
        if row:
            yield f"{path}:{i}", dict(zip(rows[0], row))


def _mmlu_row(row: Sequence[str]) -> bool:
    return len(row) == 6 and row[5].strip() in LETTERS[:4] and bool(row[5].strip())


def _bare(path: Path) -> bool:
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        return _mmlu_row(next(csv.reader(f), []))
