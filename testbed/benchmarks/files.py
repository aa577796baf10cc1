"""Benchmarks from local files. They are read and checked before a model is loaded, and the probe `benchmarks` asks them.

A file is one benchmark, named by its stem. A folder holds one benchmark for each file, but all its csv files without a
header are pooled, because they are MMLU's subjects. A zip of JSON lines is one benchmark. A .txt file is running text
with a paragraph in each line (WikiText); it is read only when it is named itself. `suites.yaml` names sets of benchmarks that
are asked for together: files under the data root or, in their absence, datasets of the hub.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from streams.data import table
from testbed.benchmarks import hub
from testbed.benchmarks.formats import LETTERS, BadItem, BenchmarkItem, RecordSource, SkippedItem, item_of
from testbed.core.events import BadPicture, Question
from testbed.core.ranges import NonNegativeInt, PositiveInt, out_of_range
from testbed.probes.base import Benchmark, draw

MOST_UNPACKED = 2**30
"""Bytes that one file in a zip may unpack to."""
_SPLITS = ("_test", "_dev", "_val", "_validation")


class BadBenchmark(ValueError):
    """A file that cannot be used; the message gives its path, the position and what was expected."""


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings of all benchmarks of a run, given by `--set benchmarks.field=value`."""

    items: PositiveInt = 32
    """Questions of each benchmark, drawn by hash and the same at every checkpoint; fewer where the budget shrinks panels."""
    shots: NonNegativeInt = 0
    """Solved examples before each question; an example is never a question itself."""
    scoring: Literal["sum", "norm", "generate"] = "sum"
    """How a choice is made: by log-probability, by log-probability per character, or by generating the choice's text."""

    def problems(self) -> list[str]:
        """Every value that is out of range, as sentences."""
        return out_of_range(self)


def describe(benchmark: Benchmark) -> dict[str, Any]:
    """A benchmark's entry in the manifest. `chance` is the mean score of random guessing: 0 for free generation, absent for
    refusals and running text."""
    questions = benchmark.questions
    scorings = sorted({q.scoring for q in questions})
    out = {"items": benchmark.size, "asked": len(questions), "shots": benchmark.shots, "scoring": ", ".join(scorings)}
    if not {"refuse", "comply"} & {*scorings} and not any(q.split == "text" for q in questions):
        competing = [len({*q.choices} - {*q.aliases}) for q in questions]
        out["chance"] = sum(1 / n if n else 0 for n in competing) / len(questions)
    return out


@dataclass(frozen=True)
class LoadedBenchmarks:
    """A run's benchmarks; for each skipped record a line with its position and the reason; and a line for each from the hub."""

    every: tuple[Benchmark, ...] = ()
    skipped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


SUITES: dict[str, dict[str, dict[str, Any]]] = table(__file__, "suites.yaml")
"""By the name of a suite and of a benchmark: `file`, a pattern under the folder `benchmarks` of a data root, and what of the hub stands
in for it (`dataset`, `config`, `split`)."""


def load(paths: Sequence[Path], config: BenchmarkConfig, data_root: Path | None = None) -> LoadedBenchmarks:
    """The benchmarks of these files, folders and suites, in their order. Raises `BadBenchmark`."""
    found: dict[str, Benchmark] = {}
    origin: dict[str, Path] = {}
    skipped: list[str] = []
    notes: list[str] = []
    for path in paths:
        suite = str(path) in SUITES and not path.exists()
        for name, items in _read_suite(str(path), data_root, skipped, notes) if suite else _read(path, skipped):
            if name in found:
                raise BadBenchmark(f"{path}: a benchmark {name!r} was read from {origin[name]} already; rename one of the files")
            found[name], origin[name] = _benchmark(name, items, config, path), path
    return LoadedBenchmarks(tuple(found.values()), tuple(skipped), tuple(notes))


def _benchmark(name: str, items: Sequence[BenchmarkItem], config: BenchmarkConfig, path: Path) -> Benchmark:
    """In the order of the draws, the first items with an answer to show become examples, and the next ones questions."""
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


def _question(name: str, item: BenchmarkItem, examples: Sequence[BenchmarkItem], config: BenchmarkConfig) -> Question:
    topic = f"{item.kind}:{name}"
    if item.scoring == "perplexity":
        return Question("text", item.prompt, topic=topic)
    scoring: Any = config.scoring if item.scoring == "choice" else item.scoring
    solved = "".join(f"{e.prompt} {e.answer}\n\n" for e in examples if item.shown)
    choices = item.choices if scoring != "generate" else ()
    return Question("general", solved + item.prompt, item.answer, None, item.image, item.aliases, topic, choices, scoring)


def _read_suite(suite: str, data_root: Path | None, skipped: list[str], notes: list[str]) -> Iterator[tuple[str, list[BenchmarkItem]]]:
    """The items of each benchmark of a suite, from its file, else from the hub; one that neither has is left out with a line."""
    folder, missing = data_root / "benchmarks" if data_root else None, []
    for name, source in SUITES[suite].items():
        path = next(iter(sorted(folder.glob(source["file"]))), None) if folder else None
        try:
            if path is not None:
                yield name, [item for _, items in _read(path, skipped) for item in items]
            else:
                yield name, list(_parse(hub.records(source), RecordSource(Path(), name), skipped, f"the dataset of {name}"))
                notes.append(f"suite {suite}: {name} is read from the hub's {hub.named(source)}")
        except hub.NotOnHub as e:
            nowhere = f"{folder} holds no {source['file']}" if folder else "no --data-root is given"
            missing.append(f"suite {suite}: {name} is left out, because {nowhere}, and the hub gives none: {e}")
    if len(missing) == len(SUITES[suite]):
        raise BadBenchmark("\n".join([f"--benchmarks {suite}: give with --data-root the folder that holds benchmarks/", *missing]))
    skipped += missing


def _read(path: Path, skipped: list[str]) -> Iterator[tuple[str, list[BenchmarkItem]]]:
    """The items of each benchmark of a path, by name; a line for each skipped record is appended to `skipped`."""
    if not path.exists():
        raise BadBenchmark(f"--benchmarks {path} does not exist")
    if path.is_file():
        yield _name(path), list(_items(path, skipped))
        return
    files = sorted(p for p in path.rglob("*") if p.suffix in _READERS and p.suffix != ".txt")
    bare = [p for p in files if p.suffix == ".csv" and _bare(p)]
    for p in files:
        if p not in bare:
            yield _name(p), list(_items(p, skipped))
    if bare:
        yield "mmlu", [i for p in bare for i in _items(p, skipped)]
    if not files:
        raise BadBenchmark(f"--benchmarks {path} holds no {', '.join(s for s in _READERS if s != '.txt')} file")


def _name(path: Path) -> str:
    stem = path.stem.lower()
    return next((stem.removesuffix(s) for s in _SPLITS if stem.endswith(s)), stem)


def _items(path: Path, skipped: list[str]) -> Iterator[BenchmarkItem]:
    """Items of one file. Raises `BadBenchmark` with the file and the record's number."""
    if path.suffix not in _READERS:
        raise BadBenchmark(f"{path}: expected a file that ends in {', '.join(_READERS)}")
    try:
        yield from _parse(_READERS[path.suffix](path), RecordSource(path.parent, _name(path)), skipped, str(path))
    except (OSError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error, csv.Error) as e:
        raise BadBenchmark(f"{path} cannot be read: {e}") from e


def _parse(records: Iterable[tuple[str, Any]], source: RecordSource, skipped: list[str], title: str) -> Iterator[BenchmarkItem]:
    """Items of records with their positions. Raises `BadBenchmark`."""
    empty = True
    for where, record in records:
        empty = False
        try:
            yield item_of(record, source)
        except SkippedItem as e:
            skipped.append(f"{where}: {e}")
        except BadItem as e:
            raise BadBenchmark(f"{where}: {e}") from e
    if empty:
        raise BadBenchmark(f"{title} holds no records")


def _json_lines(name: str, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Records of lines that end in a line feed alone, because JSON text may hold U+2028."""
    yield from ((f"{name}:{i}", _parsed(f"{name}:{i}", line)) for i, line in enumerate(lines, 1) if line.strip())


def _parsed(where: str, text: str) -> Any:
    """A JSON value. Raises `BadBenchmark`, also for one that is nested too deeply to be a record."""
    try:
        return json.loads(text)
    except RecursionError as e:
        raise BadBenchmark(f"{where} is nested too deeply to be a record: expected an object of texts and lists of texts") from e
    except ValueError as e:
        raise BadBenchmark(f"{where} is not JSON: {e}") from e


def _zipped(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of the .jsonl files in a zip, read line by line, because a small archive may unpack to more than the memory."""
    with zipfile.ZipFile(path) as z:
        for member in sorted((m for m in z.infolist() if _holds_records(m.filename)), key=lambda m: m.filename):
            if member.file_size > MOST_UNPACKED:
                size = f"{member.file_size / 1e6:,.0f} MB"
                raise BadBenchmark(f"{path}!{member.filename} unpacks to {size}, over {MOST_UNPACKED / 1e6:,.0f} MB: unpack and split it")
            with z.open(member) as raw:
                yield from _json_lines(f"{path}!{member.filename}", io.TextIOWrapper(raw, "utf-8", newline="\n"))


def _holds_records(name: str) -> bool:
    return name.endswith(".jsonl") and not Path(name).name.startswith(".")


def _listed(path: Path) -> Iterator[tuple[str, Any]]:
    records = _parsed(str(path), path.read_text(encoding="utf-8"))
    if not isinstance(records, list):
        raise BadBenchmark(f"{path} must hold a list of objects, found {type(records).__name__}")
    yield from ((f"{path}[{i}]", r) for i, r in enumerate(records))


def _paragraphs(path: Path) -> Iterator[tuple[str, Any]]:
    """Lines of running text, without empty lines and without WikiText's headings."""
    for i, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if line.strip() and not line.strip().startswith("="):
            yield f"{path}:{i}", {"text": line}


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    """Records of a csv file with a header, or of MMLU's six columns without one."""
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
    bare = bool(rows) and _mmlu_row(rows[0])
    for i, row in enumerate(rows, 1):
        if bare and not _mmlu_row(row):
            raise BadBenchmark(f"{path}:{i}: expected a question, four choices and a letter from A to D, found {len(row)} columns")
        if bare:
            yield f"{path}:{i}", {"question": row[0], "choices": row[1:5], "answer": row[5]}
        elif row and i > 1:
            yield f"{path}:{i}", dict(zip(rows[0], row))


def _mmlu_row(row: Sequence[str]) -> bool:
    return len(row) == 6 and row[5].strip() in LETTERS[:4] and bool(row[5].strip())


def _bare(path: Path) -> bool:
    with open(path, encoding="utf-8-sig", errors="replace") as f:
        return _mmlu_row(next(csv.reader(f), []))


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": lambda path: _json_lines(str(path), path.read_text(encoding="utf-8").split("\n")),
    ".json": _listed,
    ".csv": _table,
    ".zip": _zipped,
    ".txt": _paragraphs,
}
"""By the suffix of a file, the function that reads its records."""
