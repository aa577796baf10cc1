"""The data of the report's explorer: a run's answers as compact columns, with every text stored once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from analysis.figures.style import editor_styles
from analysis.metrics.answers import panel_answers, year_ends
from analysis.metrics.curves import years_passed
from analysis.reading.load import EditorRun, Run
from analysis.reading.records import AFTER, SCORING_MODES, stored_texts

MOST_MB = 4.0
"""Bound on the data block in megabytes (10^6 bytes of JSON); a larger run is sampled by facts."""
_MOST_ROWS = 60_000
"""Answers of the first attempt, about 6 MB: a run of millions is not written out to find that it is too large."""
_DIGITS = 4
"""Decimals of a stored score."""


def data_block(run: Run, mode: str, seed: int = 0, most_mb: float = MOST_MB) -> Markup:
    """The JSON of the explorer, safe inside a script element and at most `most_mb` megabytes long.

    `rows` holds one entry an answer in each column: e (editor), q (question), s (step), y (year), m (0: from the
    panel at a year's end, as in the figure of retention; 1: right after the edit; 2: any other), l (1: the edit was live), w
    (weight, 1 / chance of being asked), want and got (rows of `texts`, -1 for none), and one column of scores for each scoring
    mode (null: not measured). Where the run is too large, whole facts are drawn at
    random with `seed`, for all editors alike, and `kept` and `facts` say how many of how many. mode: the column of scores that
    is shown first, that of the page's leading tables.
    """
    units = _units(run)
    order = np.random.default_rng(seed).permutation(units.max() + 1)
    answers = sum(len(e.records) for e in run.editors.values())
    kept = len(order) if answers <= _MOST_ROWS else max(1, len(order) * _MOST_ROWS // answers)
    while True:
        drawn = {"facts": len(order), "kept": kept, "seed": seed, "mb": most_mb, "mode": mode}
        data = explorer_data(run, np.isin(units, order[:kept])) | drawn
        text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        if len(text) <= most_mb * 1e6 or kept == 0:
            return Markup(text)
        kept = min(kept - 1, int(kept * 0.95 * most_mb * 1e6 / len(text)))


def explorer_data(run: Run, chosen: np.ndarray) -> dict[str, Any]:
    """The columns of the answers to the chosen questions; chosen: (questions,) booleans."""
    texts = _Texts()
    frames = [_answers(run, editor, number, chosen, texts) for number, editor in enumerate(run.editors.values())]
    rows = pd.concat(frames, ignore_index=True)
    asked, codes = np.unique(rows["q"], return_inverse=True)
    rows["q"] = codes
    questions = run.questions.iloc[asked]
    edits = pd.Index(run.events["edit_id"]).get_indexer(pd.Index(questions["event_id"]))
    used, facts = np.unique(edits[edits >= 0], return_inverse=True)
    fact = np.full(len(edits), -1)
    fact[edits >= 0] = facts
    events = run.events.iloc[used]
    colours = editor_styles(list(run.editors))
    return {
        "editors": list(run.editors),
        "colours": [colours[e].colour for e in run.editors],
        "modes": {m.column: m.title for m in SCORING_MODES},
        "questions": {
            "prompt": texts.rows(questions["prompt"]),
            "image": texts.rows(questions["image"]),
            "split": texts.rows(questions["split"]),
            "fact": fact.tolist(),
        },
        "events": {"prompt": texts.rows(events["prompt"]), "target": texts.rows(events["target"]), "step": events["step"].tolist()},
        "rows": {c: [None if pd.isna(v) else v for v in rows[c].tolist()] for c in rows.columns},
        "texts": list(texts.known),
    }


class _Texts:
    """Texts by number, in the order in which they were met."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def rows(self, values: Iterable[Any]) -> list[int]:
        """The number of each text, -1 for none."""
        return [self.known.setdefault(v, len(self.known)) if isinstance(v, str) else -1 for v in values]


def _units(run: Run) -> np.ndarray:
    """What is drawn together: all questions of an edit, and every other question by itself."""
    return pd.factorize(run.questions["event_id"].fillna(run.questions["question_id"]))[0]


def _at_year_ends(editor: EditorRun) -> pd.Index:
    """The rows behind the points of the static curves."""
    splits = editor.records["split"].unique()
    return pd.Index(np.concatenate([year_ends(panel_answers(editor.records, s)).index for s in splits]))


def _answers(run: Run, editor: EditorRun, number: int, chosen: np.ndarray, texts: _Texts) -> pd.DataFrame:
    """The rows of one editor."""
    frame = editor.records[chosen[editor.records["question"].to_numpy()]]
    table = stored_texts(editor.folder, frame.index.to_numpy())
    columns = {
        "e": np.full(len(frame), number),
        "q": frame["question"].to_numpy(),
        "s": frame["step"].to_numpy(),
        "y": years_passed(run, np.floor(frame["time"].to_numpy())).astype(int),
        "m": np.where(frame.index.isin(_at_year_ends(editor)), 0, np.where(frame["role"] == AFTER, 1, 2)),
        "l": frame["live"].to_numpy().astype(int),
        "w": frame["weight"].to_numpy().round(_DIGITS),
        "want": texts.rows(table["answer"].to_pylist()),
        "got": texts.rows(table["generated"].to_pylist()),
    }
    return pd.DataFrame(columns | {m.column: frame[m.column].to_numpy(float).round(_DIGITS) for m in SCORING_MODES})
