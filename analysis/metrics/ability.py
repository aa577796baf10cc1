"""What edits do to everything else: general abilities, running text, unrelated facts, benchmarks, safety sets."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from analysis.metrics.answers import SIGNED, Metrics, at_end, means, plain_means, pooled, unedited
from analysis.metrics.bootstrap import Draws, Resampler, combine
from analysis.metrics.catalogue import SUFFIXES
from analysis.reading.load import READINGS, EditorRun, Run
from analysis.reading.records import BENCH, FRESH, SAFETY, UNRELATED

GROUPS = {"benchmark": BENCH, "safety": SAFETY}
"""Groups of topics that are told apart from the stream's own general questions."""


def of_everything_else(run: Run, editor: EditorRun, resampler: Resampler) -> Metrics:
    """All metrics of this file that can be computed."""
    out = general_drop(editor, resampler) | perplexity_ratio(editor, resampler) | unrelated_kept(editor.records, resampler)
    for group, role in GROUPS.items():
        out |= group_drop(f"{group}_drop", editor, role, resampler)
    return out | skill_drop(editor, guessing(run.questions), resampler)


def general_drop(editor: EditorRun, resampler: Resampler) -> Metrics:
    """Mean over general questions at the end of y_unedited - y. In [-1, 1]; 0 is intact."""
    return _drop("general_drop", editor, at_end(editor.records, "general"), resampler)


def perplexity_ratio(editor: EditorRun, resampler: Resampler) -> Metrics:
    """exp(NLL/token of running text at the end - NLL/token of the unedited model on the same texts); 1 is intact."""
    end = at_end(editor.records, "text")
    base = editor.base.iloc[end["question"]]
    both = (end["logprob"].notna().to_numpy()) & (base["logprob"].notna().to_numpy())
    end, base = end[both], base[both]
    if end.empty or np.isinf(end["logprob"]).any():
        return {}
    weight = end["weight"].to_numpy()[:, None]
    top = -np.column_stack([end["logprob"], base["logprob"]]) * weight
    bottom = np.column_stack([end["n_tokens"], base["n_tokens"]]) * weight
    now, before = resampler.ratios(end["cluster"].to_numpy(), top, bottom)
    if now is None or before is None:
        return {}
    return {"perplexity_ratio": combine(lambda a, b: np.exp(a - b), now, before, bounds=None)}


def log_perplexities(editor: EditorRun) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Answers on running text that are finite on both sides, and the unedited model's on the same texts."""
    rows = editor.records[editor.records["split"] == "text"]
    base = editor.base.iloc[rows["question"]]
    known = np.isfinite(rows["logprob"].to_numpy()) & np.isfinite(base["logprob"].to_numpy())
    return rows[known], base[known]


def unrelated_kept(rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    """Agreement with the unedited model at the end, on the fixed panel that no edit is about. In [0, 1]."""
    return plain_means("unrelated_kept", _last(rows[rows["role"] == UNRELATED]), resampler)


def group_drop(name: str, editor: EditorRun, role: int, resampler: Resampler) -> Metrics:
    """Mean over the topics of a group (each counts alike) of the mean of y_unedited - y at the end. In [-1, 1]."""
    rows = _last(editor.records[(editor.records["role"] == role)])
    found: dict[str, list[Draws]] = {}
    for _, own in topics(rows):
        for key, draws in _drop(name, editor, own, resampler).items():
            found.setdefault(key, []).append(draws)
    return {k: combine(lambda *v: np.mean(v, axis=0), *d, bounds=SIGNED) for k, d in found.items()}


def guessing(questions: pd.DataFrame) -> np.ndarray:
    """What guessing scores on each question: 1 / (choices but those that are right besides the answer), 0 where an answer is
    generated, nan where it is judged whether a request is refused."""
    if "choices" not in questions:
        return np.zeros(len(questions))
    many = [len(set(c) - set(a)) for c, a in zip(questions["choices"], questions["aliases"])]
    chance = np.array([1 / n if n else 0.0 for n in many])
    return np.where(questions["scoring"].isin(("refuse", "comply")), np.nan, chance)


def skill_drop(editor: EditorRun, chance: np.ndarray, resampler: Resampler) -> Metrics:
    """Mean over benchmarks of the loss of skill, (mean y - c) / (1 - c) with c what guessing scores; by choices or free generation.

    In [-2, 2]: 1 is a fall from all right to guessing.
    """
    rows = _last(editor.records[(editor.records["role"] == BENCH)])
    found = []
    for _, own in topics(rows):
        lost = unedited(editor, own)[:, READINGS.index("gen")] - own["gen"].to_numpy()
        room = np.where(np.isnan(lost), 0.0, own["weight"].to_numpy() * (1 - chance[own["question"]]))
        top = np.nan_to_num(lost) * own["weight"].to_numpy()
        found += resampler.ratios(own["cluster"].to_numpy(), top[:, None], room[:, None])
    known = [d for d in found if d is not None]
    return {"skill_drop": combine(lambda *v: np.mean(v, axis=0), *known, bounds=(-2.0, 2.0))} if known else {}


def topics(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows of each topic, by name."""
    for topic, own in rows.groupby("topic", observed=True, sort=True):
        yield str(topic), own


def topic_table(run: Run, editor: EditorRun, resampler: Resampler) -> pd.DataFrame:
    """One row a topic and reading: topic, reading, value, low, high, n at the end, what the unedited model scored, and what
    guessing scores (of choices and free generation)."""
    rows, chance = editor.records, guessing(run.questions)
    general = rows[(rows["split"] == "general") & ~rows["role"].isin((FRESH, UNRELATED)) | rows["role"].isin(list(GROUPS.values()))]
    out = []
    for topic, own in topics(general):
        last = _last(own)
        before = unedited(editor, last)
        for j, suffix in enumerate(SUFFIXES):
            now, then = (pooled(last, s, np.zeros(len(last), int), 1, resampler)[0] for s in (last[READINGS[j]].to_numpy(), before[:, j]))
            if now is not None:
                guess = float(np.average(chance[last["question"]], weights=last["weight"])) if suffix == "_gen" else None
                out.append({"topic": topic, "reading": suffix, **now.interval(), "unedited": then.value if then else None, "chance": guess})
    return pd.DataFrame(out, columns=["topic", "reading", "value", "low", "high", "n", "unedited", "chance"])


def _last(rows: pd.DataFrame) -> pd.DataFrame:
    return rows[rows["step"] == rows["step"].max()]


def _drop(name: str, editor: EditorRun, rows: pd.DataFrame, resampler: Resampler) -> Metrics:
    return means(name, rows, unedited(editor, rows) - rows[list(READINGS)].to_numpy(), resampler, SIGNED)
