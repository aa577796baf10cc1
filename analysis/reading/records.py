"""Record files as data frames of numbers: column types, scores, and the row numbers of questions and edits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from analysis.reading.grades import Grader, grader
from testbed.core import grading
from testbed.core.checksums import DAMAGED, is_damaged

pc: Any = pyarrow.compute
"""Arrow creates these functions at import, so no type checker knows them."""


@dataclass(frozen=True)
class ScoringMode:
    """One definition of a correct answer.

    column: the scores of this mode in a frame of records. suffix: the end of its metrics' names in summary.json.
    title: its name in tables and figures.
    """

    column: str
    suffix: str
    title: str


TOKEN_ACCURACY = ScoringMode("tf", "", "token accuracy")
"""Share of the answer's tokens that the model predicts under teacher forcing."""
ALL_TOKENS = ScoringMode("tf_exact", "_exact", "all tokens")
"""1 where the model predicts every token of the answer under teacher forcing."""
FREE_GENERATION = ScoringMode("gen", "_gen", "free generation")
"""1 where the freely generated text equals an accepted answer."""
BEGINS = ScoringMode("begins", "_begins", "begins")
"""1 where the freely generated text begins with an accepted answer: models that were not taught to stop go on."""
CONTAINS = ScoringMode("contains", "_contains", "contains")
"""1 where its first sentence holds an accepted answer and no other candidate: chat models answer in sentences."""
SCORING_MODES = (TOKEN_ACCURACY, ALL_TOKENS, FREE_GENERATION, BEGINS, CONTAINS)
SHOWN_MODES = SCORING_MODES[:3]
"""The modes that figures set side by side; tables have all."""
SCORES = [mode.column for mode in SCORING_MODES]
"""Score columns of a frame of records, in the order of SCORING_MODES."""

RIGHT_AFTER = "right_after"
"""The probe that asks about the edits of a step right after that step."""
PANEL, AFTER, LADDER, FRESH, UNRELATED, BENCH, SAFETY = range(7)
"""Roles of an answer (column `role`): from a panel of live edits or the stream's general questions, right after its edit,
from the cohort that is asked at fixed ages, from a sample drawn afresh at every checkpoint, from the fixed panel of
questions unrelated to any edit, from a benchmark, from a safety set."""
PREFIXES = {"bench:": BENCH, "safety:": SAFETY}
"""Prefixes of the topics of benchmarks and safety sets."""
_ROLES = {"cohort_ladder": LADDER, "rotating_fresh": FRESH, "fixed_unrelated": UNRELATED}

_NUMBERS = ("token_hits", "n_tokens", "logprob", "exact")
TYPES = dict.fromkeys(("edit_id", "probe", "panel", "split", "topic", "question_id"), pa.string()) | {"probe_step": pa.int64()}
TYPES |= dict.fromkeys(("probe_time", *_NUMBERS, "incl_prob"), pa.float64())
TYPES["generated"] = pa.dictionary(pa.int32(), pa.string())
"""Columns of a record file that the analysis reads, with their types."""


class BadRun(ValueError):
    """A run folder that cannot be analysed; the message names the file, what was expected and what to do."""


def read_table(path: Path, columns: Sequence[str] | None = None, coded: Sequence[str] = ()) -> pa.Table:
    """A parquet file, or the named columns of it; columns in `coded` are dictionary-encoded. Raises `BadRun`."""
    if not path.is_file():
        raise BadRun(f"{path} is missing; the run folder is not complete")
    try:
        if is_damaged(path):
            raise BadRun(f"{path} {DAMAGED}; --resume makes it again")
        file = pq.ParquetFile(path)
        lacking = [c for c in columns or () if c not in file.schema_arrow.names]
        if lacking:
            raise BadRun(f"{path} lacks the columns {', '.join(lacking)}: it was written by another schema version than the manifest says")
        file = pq.ParquetFile(path, metadata=file.metadata, read_dictionary=list(coded)) if coded else file
        return file.read(columns=list(columns) if columns else None)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadRun(f"{path} cannot be read ({error}); remove it and resume the run") from error


def part_files(folder: Path, steps: Collection[int] | None = None) -> list[Path]:
    """An editor's record files; with `steps`, only files whose footers do not rule out an answer of one of these steps."""
    parts = sorted((folder / "records").glob("step-*.parquet"))
    return parts if steps is None else [p for p in parts if any(low <= s <= high for low, high in _step_ranges(p) for s in steps)]


def _step_ranges(path: Path) -> list[tuple[float, float]]:
    """First and last step of each row group; unbounded where the file keeps no statistics."""
    metadata, ranges = pq.read_metadata(path), []
    column = metadata.schema.names.index("probe_step")
    for group in range(metadata.num_row_groups):
        known = metadata.row_group(group).column(column).statistics
        ranges.append((known.min, known.max) if known is not None and known.has_min_max else (-np.inf, np.inf))
    return ranges


def answers_with(folder: Path, key: str, columns: Sequence[str], steps: Collection[int] | None = None) -> pd.DataFrame:
    """The answers of an editor's folder whose `extras` (a JSON object beside the scores) have a key.

    Gives the named columns, and `extras` as stored. steps: only answers at one of these steps. Raises `BadRun` for a file
    that cannot be read.
    """
    where = None if steps is None else pc.field("probe_step").isin(list(steps))
    parts = [rows_with(path, key, tuple(dict.fromkeys([*columns, "probe_step"])), where) for path in part_files(folder, steps)]
    parts = [p for p in parts if len(p)] or [pd.DataFrame(columns=[*columns, "extras"])]
    return pd.concat(parts, ignore_index=True)[[*columns, "extras"]]


def rows_with(path: Path, key: str, columns: Sequence[str], where: Any = None) -> pd.DataFrame:
    """The rows of one file whose extras have a key and for which the Arrow expression `where` holds; columns as in `answers_with`.

    Arrow picks the rows, so that millions of answers never become Python strings. JSON escapes a quotation mark inside a
    text, so `"key":` occurs only where the key does.
    """
    coded = read_table(path, ("extras",), coded=("extras",))["extras"].combine_chunks()
    has = pc.fill_null(pc.match_substring(coded.dictionary, f'"{key}":').take(coded.indices), False)
    if not pc.any(has).as_py():
        return pd.DataFrame(columns=[*columns, "extras"])
    table = read_table(path, columns).append_column("extras", coded.cast(pa.string())).filter(has)
    return (table if where is None else table.filter(where)).to_pandas()


def stored_texts(folder: Path, wanted: np.ndarray) -> pa.Table:
    """Columns answer and generated of the wanted rows of an editor's folder, a file at a time.

    wanted: (rows,) int, rising: the index of a frame of records, which counts rows over the record files one after another.
    """
    start, taken = 0, []
    for path in part_files(folder):
        table = read_table(path, ("answer", "generated"))
        own = wanted[(wanted >= start) & (wanted < start + table.num_rows)]
        taken.append(table.take(pa.array(own - start)))
        start += table.num_rows
    return pa.concat_tables(taken)


def read_records(folder: Path, events: pd.DataFrame, questions: pd.DataFrame, grade: Grader) -> tuple[pd.DataFrame | None, list[str]]:
    """An editor's answers as numbers (columns: see `analysis.reading.load.EditorRun`), and notes about irregularities."""
    tables = [typed(read_table(p, tuple(TYPES))) for p in part_files(folder)]
    table = pa.concat_tables(tables) if tables else None
    if table is None or not table.num_rows:
        return None, ["no records yet, left out"]
    broken = int(pc.sum(pc.is_in(table["logprob"], pa.array([-np.inf]))).as_py() or 0)
    notes = [f"{broken} answers have a log-probability that is not finite"] if broken else []
    numbered = _numbered(table, events, questions, folder)
    every, changed = _with_scores(numbered, grade, table["generated"])
    notes += [f"{changed} answers are judged otherwise by grading version {grading.VERSION} than when they were stored"] if changed else []
    frame = _without_repeats(every)
    lost = len(every) - len(frame)
    notes += [f"{lost} answers were stored twice; one of each was kept"] if lost else []
    return _with_event_facts(frame, events, questions), notes


def read_base(folder: Path, events: pd.DataFrame, questions: pd.DataFrame, version: int | None) -> tuple[pd.DataFrame, Grader]:
    """The unedited model's scores, one row for each question of questions.parquet (nan where it was not asked), and the grader.

    version: the grading version of the manifest (`analysis.reading.grades`).
    """
    frame = typed(read_table(folder / "base" / "answers.parquet", ("question_id", *_NUMBERS, "generated"))).to_pandas()
    frame = frame.drop_duplicates("question_id").set_index("question_id").reindex(questions["question_id"]).reset_index(drop=True)
    texts = frame.pop("generated")
    grade = grader(events, questions, texts.astype(object), version)
    frame["question"] = np.arange(len(frame))
    scored, _ = _with_scores(frame, grade, pa.chunked_array([pa.array(texts.astype(object), pa.string(), from_pandas=True)]))
    return scored.drop(columns="question"), grade


def typed(table: pa.Table) -> pa.Table:
    """Columns in the types of the schema; integers and booleans that may be absent become floats.

    A measured log-probability that is not a number (from a broken model) becomes -inf, which tells it from one that was
    not measured.
    """
    numbers = [c.cast(pa.int8()) if pa.types.is_boolean(c.type) else c for c in table.columns]
    columns = {name: column.cast(TYPES[name]) for name, column in zip(table.column_names, numbers)}
    broken = pc.and_(pc.is_nan(columns["logprob"]), pc.greater(columns["n_tokens"], 0))
    columns["logprob"] = pc.if_else(pc.fill_null(broken, False), -np.inf, columns["logprob"])
    return pa.table(columns)


def _numbered(table: pa.Table, events: pd.DataFrame, questions: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Replaces ids by row numbers. Raises `BadRun` for a question that questions.parquet lacks."""
    frame = pd.DataFrame({n: table[n].to_numpy() for n in _NUMBERS})
    frame["question"] = rows_of(table["question_id"], questions["question_id"])
    frame["edit"] = rows_of(table["edit_id"], events["edit_id"])
    unknown = int((frame["question"] < 0).sum())
    if unknown:
        raise BadRun(
            f"{folder}/records: {unknown} answers are to questions that questions.parquet lacks; the files belong to different runs"
        )
    for name in ("probe", "split", "topic"):
        frame[name] = table[name].combine_chunks().dictionary_encode().to_pandas()
    frame["role"] = _role(table)
    frame["step"], frame["time"] = table["probe_step"].to_numpy().astype(np.int32), table["probe_time"].to_numpy()
    chance = table["incl_prob"].to_numpy()
    bad = int((~((chance > 0) & (chance <= 1))).sum())
    if bad:
        raise BadRun(f"{folder}/records: {bad} answers have an inclusion probability outside (0, 1] (or none); they cannot be weighted")
    frame["weight"] = 1 / chance
    return frame


def _role(table: pa.Table) -> np.ndarray:
    role = np.where(pc.equal(table["probe"], RIGHT_AFTER), AFTER, PANEL).astype(np.int8)
    for name, code in _ROLES.items():
        role[pc.fill_null(pc.equal(table["panel"], name), False).to_numpy()] = code
    for prefix, code in PREFIXES.items():
        role[pc.fill_null(pc.starts_with(table["topic"], prefix), False).to_numpy()] = code
    return role


def rows_of(ids: pa.ChunkedArray, index: pd.Series) -> np.ndarray:
    """Row numbers of ids in an index; -1 for an absent or unknown id."""
    coded = ids.combine_chunks().dictionary_encode()
    rows = pd.Index(index).get_indexer(pd.Index(coded.dictionary.to_pylist(), dtype=index.dtype)).astype(np.int32)
    codes = pc.fill_null(coded.indices, -1).to_numpy(zero_copy_only=False)
    return np.append(rows, np.int32(-1))[codes]


def edits_at(events: pd.DataFrame, step: np.ndarray) -> np.ndarray:
    """Number of edits applied after each of the given steps."""
    return np.searchsorted(np.sort(events["step"].to_numpy()), step, side="right")


def _with_scores(frame: pd.DataFrame, grade: Grader, texts: pa.ChunkedArray) -> tuple[pd.DataFrame, int]:
    """Adds the scores of all modes, nan where an answer was not scored in that mode; and how many stored verdicts changed."""
    scored = frame["n_tokens"].where(frame["n_tokens"] > 0)
    frame["tf"] = frame.pop("token_hits") / scored
    frame["tf_exact"] = (frame["tf"] >= 1).astype(float).where(frame["tf"].notna())
    stored = frame.pop("exact").to_numpy(float)
    coded = texts.combine_chunks().dictionary_encode().to_pandas().array
    frame["gen"], frame["begins"], frame["contains"] = grade(frame["question"].to_numpy(np.int64), stored, coded).T
    return frame, int((stored != frame["gen"])[~np.isnan(stored)].sum())


def _without_repeats(frame: pd.DataFrame) -> pd.DataFrame:
    """Keeps one answer for each step, question and role: the one with the largest inclusion probability."""
    if pd.Index(keys(frame)).is_unique:
        return frame
    first = frame.sort_values("weight", kind="stable")
    return first[~pd.Index(keys(first)).duplicated()].sort_index()


def keys(rows: pd.DataFrame) -> np.ndarray:
    """Step, question and role of each row, packed into one integer."""
    return (rows["step"].to_numpy(np.int64) << 35) + (rows["question"].to_numpy(np.int64) << 3) + rows["role"].to_numpy()


def _with_event_facts(frame: pd.DataFrame, events: pd.DataFrame, questions: pd.DataFrame) -> pd.DataFrame:
    """Adds age (edits applied since), liveness, cluster and distinct question, which follow from the events and questions."""
    edit, step = frame["edit"].to_numpy(), frame["step"].to_numpy()
    made = np.where(edit >= 0, events["step"].to_numpy()[edit], 0)
    gone = np.where(edit >= 0, events["superseded_step"].to_numpy()[edit], np.nan)
    frame["age"] = (edits_at(events, step) - edits_at(events, made)).astype(np.int32)
    frame["made"] = made.astype(np.int32)
    frame["live"] = (made <= step) & ~(gone <= step)
    for name in ("cluster", "asked"):
        frame[name] = questions[name].to_numpy()[frame["question"]]
    return frame
