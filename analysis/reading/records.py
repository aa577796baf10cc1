"""Record files as frames of numbers: types, scores, row numbers of questions and edits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

pc: Any = pyarrow.compute
"""Its functions are made at import, so no type checker knows them."""

READINGS = ("tf", "tf_exact", "gen")
"""Three readings of "correct": share of answer tokens hit, all tokens hit, generated text exact."""
RIGHT_AFTER = "right_after"
"""The probe that asks about the edits of a step right after that step."""
PANEL, AFTER, LADDER, FRESH, UNRELATED, BENCH, SAFETY = range(7)
"""Roles of an answer (column `role`): of a panel of live edits or of the stream's general questions, right after
its edit, of the cohort asked at set ages, of draws made afresh at every checkpoint, of the fixed panel that no
edit is about, of a benchmark, of a safety set."""
PREFIXES = {"bench:": BENCH, "safety:": SAFETY}
"""How topics of benchmarks and safety sets begin."""
_ROLES = {"cohort_ladder": LADDER, "rotating_fresh": FRESH, "fixed_unrelated": UNRELATED}

TYPES = {
    "edit_id": pa.string(),
    "probe_step": pa.int64(),
    "probe_time": pa.float64(),
    "probe": pa.string(),
    "panel": pa.string(),
    "split": pa.string(),
    "topic": pa.string(),
    "question_id": pa.string(),
    "token_hits": pa.float64(),
    "n_tokens": pa.float64(),
    "logprob": pa.float64(),
    "exact": pa.float64(),
    "incl_prob": pa.float64(),
}
_BASE = ("question_id", "token_hits", "n_tokens", "logprob", "exact")


class BadRun(ValueError):
    """A run folder that cannot be analysed; the message names the file, what was expected and what to do."""


def read_table(path: Path, columns: Sequence[str] | None = None, coded: Sequence[str] = ()) -> pa.Table:
    """A file, or these of its columns; those in `coded` come as dictionaries. Raises `BadRun`."""
    if not path.is_file():
        raise BadRun(f"{path} is missing; the run folder is not complete")
    try:
        file = pq.ParquetFile(path)
        lacking = [c for c in columns or () if c not in file.schema_arrow.names]
        if lacking:
            raise BadRun(f"{path} lacks the columns {', '.join(lacking)}: it was written by another schema version than the manifest says")
        file = pq.ParquetFile(path, metadata=file.metadata, read_dictionary=list(coded)) if coded else file
        return file.read(columns=list(columns) if columns else None)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadRun(f"{path} cannot be read ({error}); remove it and resume the run") from error


def part_files(folder: Path, steps: Collection[int] | None = None) -> list[Path]:
    """An editor's record files; with `steps` those whose footers do not rule out an answer of one of these steps."""
    parts = sorted((folder / "records").glob("step-*.parquet"))
    return parts if steps is None else [p for p in parts if any(low <= s <= high for low, high in _reach(p) for s in steps)]


def _reach(path: Path) -> list[tuple[float, float]]:
    """First and last step of each row group."""
    about, out = pq.read_metadata(path), []
    at = about.schema.names.index("probe_step")
    for group in range(about.num_row_groups):
        known = about.row_group(group).column(at).statistics
        out.append((known.min, known.max) if known is not None and known.has_min_max else (-np.inf, np.inf))
    return out


def read_records(folder: Path, events: pd.DataFrame, questions: pd.DataFrame) -> tuple[pd.DataFrame | None, list[str]]:
    """An editor's answers as numbers (columns: see `analysis.reading.load.EditorRun`), and notes about what was odd."""
    tables = [typed(read_table(p, tuple(TYPES))) for p in part_files(folder)]
    table = pa.concat_tables(tables) if tables else None
    if table is None or not table.num_rows:
        return None, ["no records yet, left out"]
    broken = _count(pc.is_in(table["logprob"], pa.array([-np.inf])))
    notes = [f"{broken} answers have a log-probability that is not finite"] if broken else []
    every = _with_scores(_numbered(table, events, questions, folder))
    frame = _once(every)
    lost = len(every) - len(frame)
    notes += [f"{lost} answers were stored twice; one of each was kept"] if lost else []
    return _placed(frame, events, questions), notes


def read_base(folder: Path, questions: pd.DataFrame) -> pd.DataFrame:
    """The unedited model's scores, one row a question of questions.parquet; nan where it was not asked."""
    frame = _with_scores(typed(read_table(folder / "base" / "answers.parquet", _BASE)).to_pandas())
    return frame.drop_duplicates("question_id").set_index("question_id").reindex(questions["question_id"]).reset_index(drop=True)


def typed(table: pa.Table) -> pa.Table:
    """Columns in the types of the schema; integers and booleans that may be absent become floats.

    A log-probability that was taken but is not a number (a broken model) becomes -inf, so that it cannot be
    taken for one that was not measured.
    """
    columns = {n: _cast(c, TYPES[n]) for n, c in zip(table.column_names, table.columns)}
    broken = pc.and_(pc.is_nan(columns["logprob"]), pc.greater(columns["n_tokens"], 0))
    columns["logprob"] = pc.if_else(pc.fill_null(broken, False), -np.inf, columns["logprob"])
    return pa.table(columns)


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    return column.cast(pa.int8()).cast(kind) if pa.types.is_boolean(column.type) else column.cast(kind)


def _count(mask: pa.ChunkedArray) -> int:
    return int(pc.sum(mask).as_py() or 0)


def _numbered(table: pa.Table, events: pd.DataFrame, questions: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Ids replaced by row numbers; a question that no file explains is an error."""
    frame = pd.DataFrame({n: table[n].to_numpy() for n in ("token_hits", "n_tokens", "logprob", "exact")})
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


def _with_scores(frame: pd.DataFrame) -> pd.DataFrame:
    """Adds the three readings; nan where an answer was not scored that way."""
    scored = frame["n_tokens"].where(frame["n_tokens"] > 0)
    frame["tf"] = frame.pop("token_hits") / scored
    frame["tf_exact"] = (frame["tf"] >= 1).astype(float).where(frame["tf"].notna())
    frame["gen"] = frame.pop("exact")
    return frame


def _once(frame: pd.DataFrame) -> pd.DataFrame:
    """One answer a question, moment and role: the one that was likeliest to be asked."""
    if pd.Index(keys(frame)).is_unique:
        return frame
    first = frame.sort_values("weight", kind="stable")
    return first[~pd.Index(keys(first)).duplicated()].sort_index()


def keys(rows: pd.DataFrame) -> np.ndarray:
    """Step, question and role in one integer."""
    return (rows["step"].to_numpy(np.int64) << 35) + (rows["question"].to_numpy(np.int64) << 3) + rows["role"].to_numpy()


def _placed(frame: pd.DataFrame, events: pd.DataFrame, questions: pd.DataFrame) -> pd.DataFrame:
    """Adds age in edits, liveness and cluster, all from events.parquet."""
    edit, step = frame["edit"].to_numpy(), frame["step"].to_numpy()
    made = np.where(edit >= 0, events["step"].to_numpy()[edit], 0)
    gone = np.where(edit >= 0, events["superseded_step"].to_numpy()[edit], np.nan)
    frame["age"] = (edits_at(events, step) - edits_at(events, made)).astype(np.int32)
    frame["made"] = made.astype(np.int32)
    frame["live"] = (made <= step) & ~(gone <= step)
    frame["cluster"] = questions["cluster"].to_numpy()[frame["question"]]
    return frame
