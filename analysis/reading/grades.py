"""Judges stored answers by their texts: the lenient scoring modes, and the exact one where an older grading judged them.

A run stores whether each generation equals a gold answer. Whether it begins with one or contains one follows from the stored
text (`testbed.core.grading`), so runs of any version have these modes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from testbed.core import grading


@dataclass(frozen=True)
class Grader:
    """Gold answers and wrong candidates of each row of questions.parquet.

    judged: False for a question whose answer is no generated text with a gold answer (choices, refusals, running text).
    again: judge the exact mode too, because another version of the grading did.
    """

    golds: list[tuple[str, ...]]
    others: list[tuple[str, ...]]
    judged: np.ndarray
    again: bool

    def __call__(self, question: np.ndarray, gen: np.ndarray, texts: pd.Categorical) -> np.ndarray:
        """Scores by free generation, beginning and containing, (answers, 3); nan where an answer was not judged.

        question: row numbers of questions.parquet, (answers,). gen: stored scores by free generation, (answers,).
        """
        codes, names = np.asarray(texts.codes, np.int64), texts.categories
        scores = np.column_stack([gen, np.where(self.judged[question], gen, np.nan), np.where(self.judged[question], gen, np.nan)])
        open_ = np.flatnonzero(self.judged[question] & (codes >= 0) & ~np.isnan(gen) & (self.again | (gen < 1)))
        pairs, inverse = np.unique(question[open_] * (len(names) + 1) + codes[open_], return_inverse=True)
        verdicts = [self._verdicts(*divmod(int(pair), len(names) + 1), names) for pair in pairs]
        scores[open_] = np.array(verdicts, float).reshape(-1, 3)[inverse]
        return scores

    def _verdicts(self, question: int, code: int, names: pd.Index) -> tuple[bool, bool, bool]:
        text, golds = str(names[code]), self.golds[question]
        exact = self.again and grading.exact(text, golds)
        return exact, exact or grading.begins(text, golds), exact or grading.contains(text, golds, self.others[question])


def grader(events: pd.DataFrame, questions: pd.DataFrame, unedited: pd.Series, version: int | None) -> Grader:
    """The grader of a run.

    unedited: the unedited model's text for each question, which is the gold answer of a locality question. version: the
    manifest's grading version; without one, the stored verdicts stand.
    """
    local = questions["split"].str.startswith("locality_").to_numpy()
    aliases = questions["aliases"].map(lambda a: () if a is None else tuple(a))
    own = [() if a is None else (str(a), *more) for a, more in zip(questions["answer"], aliases)]
    golds = [((t,) if isinstance(t, str) else ()) if here else g for here, t, g in zip(local, unedited, own)]
    golds = [tuple(g for g in known if grading.normalise(g)) for known in golds]
    event = events.set_index("edit_id")[["target", "previous"]].reindex(questions["event_id"])
    wrong = [tuple(o for o in pair if isinstance(o, str) and o not in g) for g, pair in zip(golds, event.to_numpy())]
    scoring = questions["scoring"] if "scoring" in questions else pd.Series("generate", questions.index)
    judged = np.array([bool(g) for g in golds]) & (scoring == "generate").to_numpy() & (questions["split"] != "text").to_numpy()
    return Grader(golds, wrong, judged, version is not None and version != grading.VERSION)
