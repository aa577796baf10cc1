"""Side effects of edits: general abilities, running text, unrelated facts, benchmarks, safety sets."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from analysis.metrics.answers import SIGNED, Metrics, at_end, at_last_step, mean_scores, means, pooled_together, unedited
from analysis.metrics.bootstrap import Draws, Resampler, combine, mean
from analysis.reading.load import EditorRun, Run
from analysis.reading.records import BENCH, FREE_GENERATION, FRESH, SAFETY, SCORES, SCORING_MODES, UNRELATED

GROUPS = {"benchmark": BENCH, "safety": SAFETY}
"""Groups of topics that are kept apart from the stream's own general questions, with the role of their answers."""


def side_effect_metrics(run: Run, editor: EditorRun, resampler: Resampler) -> Metrics:
    """All metrics of this file that can be computed.

    general_drop: mean over general questions at the end of y_unedited - y, in [-1, 1]; 0 is intact. unrelated_kept: agreement
    with the unedited model at the end, on the fixed panel of questions unrelated to any edit, in [0, 1].
    """
    rows = editor.records
    metrics = _drop("general_drop", editor, at_end(rows, "general"), resampler) | perplexity_ratio(editor, resampler)
    metrics |= mean_scores("unrelated_kept", at_last_step(rows[rows["role"] == UNRELATED]), resampler)
    for group, role in GROUPS.items():
        metrics |= group_drop(f"{group}_drop", editor, role, resampler)
    return metrics | skill_drop(editor, chance_scores(run.questions), resampler)


def perplexity_ratio(editor: EditorRun, resampler: Resampler) -> Metrics:
    """exp(NLL per token of running text at the end - the unedited model's on the same texts), in nats; 1 is intact."""
    end = at_last_step(text_answers(editor))
    if end.empty or np.isinf(end["logprob"] + end["logprob_unedited"]).any():
        return {}
    ratio = perplexity_ratios(end, np.zeros(len(end), int), 1, resampler)[0]
    return {} if ratio is None else {"perplexity_ratio": ratio}


def broken_text(editor: EditorRun) -> dict[str, Any]:
    """The entry `perplexity_ratio` without a number, where a log-probability of running text at the end is not finite."""
    end = at_last_step(text_answers(editor))
    broken = np.isinf(end["logprob"]).any()
    return {"perplexity_ratio": {"value": None, "low": None, "high": None, "n": len(end), "kind": "not finite"}} if broken else {}


def text_answers(editor: EditorRun) -> pd.DataFrame:
    """Answers on running text, with the unedited model's in columns that end in "_unedited", where both were measured."""
    rows = editor.records[editor.records["split"] == "text"]
    base = editor.base[["logprob", "n_tokens"]].add_suffix("_unedited")
    return rows.join(base, on="question").dropna(subset=["logprob", "logprob_unedited"])


def perplexity_ratios(rows: pd.DataFrame, cell: np.ndarray, count: int, resampler: Resampler) -> list[Draws | None]:
    """Ratio of the perplexities of `text_answers` within each of `count` cells."""
    sides = []
    for model in ("", "_unedited"):
        top, bottom = -rows["logprob" + model] * rows["weight"], rows["n_tokens" + model] * rows["weight"]
        sides.append(resampler.cells(rows, top.to_numpy(), bottom.to_numpy(), cell, count))
    ratio = partial(combine, lambda now, before: np.exp(now - before), bounds=None, paired=True)
    return [None if a is None or b is None else ratio(a, b) for a, b in zip(*sides)]


def group_drop(name: str, editor: EditorRun, role: int, resampler: Resampler) -> Metrics:
    """Mean over the topics of a group, with equal weights, of the mean of y_unedited - y at the end. In [-1, 1]."""
    rows = at_last_step(editor.records[editor.records["role"] == role])
    drops: dict[str, list[Draws]] = {}
    for _, own in rows.groupby("topic", observed=True):
        for key, draws in _drop(name, editor, own, resampler).items():
            drops.setdefault(key, []).append(draws)
    return {k: combine(mean, *d, bounds=SIGNED) for k, d in drops.items()}


def chance_scores(questions: pd.DataFrame) -> np.ndarray:
    """The expected score of guessing on each question, (questions,).

    1 / number of choices (without further right choices beside the answer), 0 for a generated answer, nan where the score
    says whether a request was refused.
    """
    if "choices" not in questions:
        return np.zeros(len(questions))
    competing = [len(set(c) - set(a)) for c, a in zip(questions["choices"], questions["aliases"])]
    chance = np.array([1 / n if n else 0.0 for n in competing])
    return np.where(questions["scoring"].isin(("refuse", "comply")), np.nan, chance)


def skill_drop(editor: EditorRun, chance: np.ndarray, resampler: Resampler) -> Metrics:
    """Mean over benchmarks of the loss of skill, by choices or free generation.

    Skill is (mean y - c) / (1 - c), where c is the score of guessing. In [-2, 2]: 1 is a fall from all right to guessing.
    """
    rows = at_last_step(editor.records[editor.records["role"] == BENCH])
    drops = []
    for _, own in rows.groupby("topic", observed=True):
        lost = unedited(editor, own)[:, SCORING_MODES.index(FREE_GENERATION)] - own["gen"].to_numpy()
        most = np.where(np.isnan(lost), 0.0, own["weight"].to_numpy() * (1 - chance[own["question"]]))
        top = np.nan_to_num(lost) * own["weight"].to_numpy()
        drops += resampler.ratios(own, top[:, None], most[:, None])
    known = [d for d in drops if d is not None]
    return {"skill_drop": combine(mean, *known, bounds=(-2.0, 2.0))} if known else {}


def topic_table(run: Run, editor: EditorRun, resampler: Resampler) -> pd.DataFrame:
    """One row for each topic and scoring mode, from the answers at the end.

    Columns: topic, scoring mode (its title), value, low, high, n, questions (distinct ones), unedited (its score), chance (the
    score of guessing, for choices and free generation).
    """
    rows, chance = editor.records, chance_scores(run.questions)
    general = rows[(rows["split"] == "general") & ~rows["role"].isin((FRESH, UNRELATED)) | rows["role"].isin(list(GROUPS.values()))]
    out = []
    for topic, own in general.groupby("topic", observed=True):
        last = at_last_step(own)
        before = unedited(editor, last)
        for j, mode in enumerate(SCORING_MODES):
            now, then = (pooled_together(last, s, resampler) for s in (last[mode.column].to_numpy(), before[:, j]))
            if now is not None:
                guess = float(np.average(chance[last["question"]], weights=last["weight"])) if mode is FREE_GENERATION else None
                scores = {"unedited": then.value if then else None, "chance": guess}
                out.append({"topic": str(topic), "scoring mode": mode.title, **now.interval(), **scores})
    return pd.DataFrame(out, columns=["topic", "scoring mode", "value", "low", "high", "n", "questions", "unedited", "chance"])


def _drop(name: str, editor: EditorRun, rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    return means(name, rows, unedited(editor, rows) - rows[SCORES].to_numpy(), resampler, SIGNED)
