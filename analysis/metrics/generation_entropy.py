"""Generation entropy, which papers call fluency: how little a sampled text repeats itself.

`(2/3 H_2 + 4/3 H_3) / 2` with H_n the entropy, in bits, of the distribution of a text's n-grams of words (Zhang et al. 2018, as the
released code of ROME computes it: the weighted entropies are averaged, not added). Papers print it times 100.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis.metrics.answers import at_end
from analysis.metrics.plugin import AnswerMetric, generated_texts
from analysis.reading.load import EditorRun, Run
from testbed.core.registry import METRICS

SPLIT = "generation"
"""Split of the questions that the model goes on from (probe `generation`)."""
WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""Length of an n-gram to the weight of its entropy."""


@METRICS.register("generation_entropy")
class GenerationEntropy(AnswerMetric):
    """Mean over an edit's texts, then over edits, at the end, in bits. Absent without the questions of the probe `generation`."""

    summary = "Generation entropy (fluency): bits of the 2-grams and 3-grams of sampled texts"
    short = "Fluency"
    unit = "bits"
    better = 1

    def answers(self, run: Run, editor: EditorRun) -> pd.DataFrame:
        return at_end(editor.records, SPLIT).drop_duplicates("edit")

    def values(self, run: Run, editor: EditorRun, rows: pd.DataFrame) -> np.ndarray:
        texts = texts_by_edit(run, editor)
        return np.array([np.mean([ngram_entropy(text) for text in texts[edit]]) for edit in rows["edit"]])


def texts_by_edit(run: Run, editor: EditorRun) -> dict[int, list[str]]:
    """Row number of an edit to its sampled texts at the end, each behind its prompt, as in the released code."""
    rows, out = at_end(editor.records, SPLIT), dict[int, list[str]]()
    prompts = run.questions["prompt"].to_numpy()[rows["question"]]
    for edit, prompt, text in zip(rows["edit"], prompts, generated_texts(editor, rows)):
        out.setdefault(edit, []).append(f"{prompt} {(text or '').strip()}".strip())
    return out


def ngram_entropy(text: str) -> float:
    """Generation entropy of one text, in bits, at least 0; an n-gram length for which the text is too short counts as 0."""
    words = words_of(text)
    return float(np.mean([weight * entropy(list(zip(*(words[i:] for i in range(n))))) for n, weight in WEIGHTS.items()]))


def words_of(text: str) -> list[str]:
    """Words and punctuation marks of a text, in order."""
    return re.findall(r"\w+|[^\w\s]", text)


def entropy(items: Sequence[object]) -> float:
    """Entropy of the distribution of equal items, in bits; 0 where there is none."""
    counts = np.array(list(Counter(items).values()), float)
    shares = counts / counts.sum()
    return float(-(shares * np.log2(shares)).sum()) + 0.0
