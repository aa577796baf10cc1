"""What answers hold beside their scores (`extras`, JSON), read again from their files by the key that is asked for.

Rows are picked while they are still Arrow's, so that millions of answers never become as many Python strings. In JSON a
quotation mark inside a text is escaped, so `"key":` is found nowhere but where the key stands.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute

from analysis.reading.records import part_files, read_table

pc: Any = pyarrow.compute
"""Its functions are made at import, so no type checker knows them."""


def answers_with(folder: Path, key: str, columns: Sequence[str], steps: Collection[int] | None = None) -> pd.DataFrame:
    """The answers of an editor's folder whose extras have a key: the columns, and `extras` as it is stored.

    steps: only what was asked after one of these. Raises `BadRun` for a file that cannot be read.
    """
    where = None if steps is None else pc.field("probe_step").isin(list(steps))
    found = [rows_with(path, key, tuple(dict.fromkeys([*columns, "probe_step"])), where) for path in part_files(folder, steps)]
    found = [f for f in found if len(f)] or [pd.DataFrame(columns=[*columns, "extras"])]
    return pd.concat(found, ignore_index=True)[[*columns, "extras"]]


def rows_with(path: Path, key: str, columns: Sequence[str], where: Any = None) -> pd.DataFrame:
    """The rows of one file whose extras have a key and for which the Arrow expression `where` holds; columns as above."""
    coded = read_table(path, ("extras",), coded=("extras",))["extras"].combine_chunks()
    has = pc.fill_null(pc.match_substring(coded.dictionary, f'"{key}":').take(coded.indices), False)
    if not pc.any(has).as_py():
        return pd.DataFrame(columns=[*columns, "extras"])
    table = read_table(path, columns).append_column("extras", coded.cast(pa.string())).filter(has)
    return (table if where is None else table.filter(where)).to_pandas()
