"""Metrics from what answers hold beside their scores (`extras`): first tokens, truthfulness, and decisions to defer.

**First tokens.** The public code of multimodal editing (EasyEdit's trainer for MMEdit) measures locality by the ordered ids
of the k likeliest tokens before and after the edits, rank by rank over prompt and answer, k = 1 for text and 10 for
pictures. Here only the position that predicts the answer's first token counts, because positions inside the prompt, which
an edit hardly changes, would dilute the measure.

**Truthfulness** by multiple choice (Lin, Hilton and Evans 2022), from the log-probabilities of the choices. MC1: the best
answer is the likeliest of the competing choices. MC2: the probability of all right answers among all choices.
Self-assessment takes the probability of the new answer's letter in the same way.

**Deferral** of editors with a gate: which questions they leave to the unedited model. An edit bears on its own question and
its rephrasings, which the editor should answer; it should leave locality and general questions. Portability, stale
answers, running text and edits still to come belong to neither side and do not count.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from analysis.metrics.answers import Metrics, at_end, at_last_step, means, pooled_together
from analysis.metrics.bootstrap import Resampler, combine, harmonic, mean
from analysis.metrics.catalogue import GENERALITY, LOCALITY
from analysis.reading.load import EditorRun, Run
from analysis.reading.records import AFTER, RIGHT_AFTER, SAFETY, answers_with, pc, rows_with

FIRST_IDS = "first_ids"
"""Key in `extras` of the likeliest first tokens, in order."""
COUNTERFACT = {"efficacy_score": "choice_edit", "paraphrase_score": "choice_generality", "neighbourhood_score": "choice_locality"}
"""Metric to split of the scores of CounterFact."""
FACES = ("generality_yes_no", "generality_choice", "robustness")
"""Splits of HalluEditBench whose answer is one of several choices, which are metrics of the same name."""
RANKS = {"locality_text": 1, "locality_far": 10}
"""Splits with a first-token metric, and how many ranks are compared."""
BEARING = ("edit", *GENERALITY)
"""Splits that an edit bears on."""


def first_token_agreement(run: Run, editor: EditorRun, resampler: Resampler) -> Metrics:
    """`locality_text_top1` and `locality_far_top10` at the end, where answers hold `first_ids`. In [0, 1]; 1 is intact."""
    metrics: Metrics = {}
    for split, ranks in RANKS.items():
        end = at_end(editor.records, split)
        if end.empty:
            continue
        ids, step = run.questions["question_id"].to_numpy()[end["question"]], int(end["step"].iloc[0])
        before = _unedited_first_ids(editor.folder.parent / "base" / "answers.parquet", ids)
        after = _by_question(answers_with(editor.folder, FIRST_IDS, ("question_id",), [step]), FIRST_IDS) if before else {}
        shares = [[equal_share(before.get(q, []), after.get(q, []), ranks)] for q in ids]
        metrics |= means(f"{split}_top{ranks}", end, np.array(shares), resampler)
    return metrics


def equal_share(a: Sequence[int], b: Sequence[int], ranks: int) -> float:
    """Share of the first ranks at which two ordered lists hold the same id; nan where one list is too short."""
    if min(len(a), len(b)) < ranks:
        return float("nan")
    return sum(x == y for x, y in zip(a[:ranks], b[:ranks])) / ranks


def counterfact_scores(editor: EditorRun, resampler: Resampler) -> Metrics:
    """The scores that papers print for CounterFact, at the end: shares of questions whose right answer is the likelier of two.

    ES of edits, PS of paraphrases (new over old answer), NS of neighbours (true over new answer), and S, their harmonic mean.
    Source: Meng et al. 2022 (ROME, section 3.4; MEMIT, section 5.2.2). Absent without the questions of the probe `choices`.
    """
    metrics: Metrics = {}
    for name, split in COUNTERFACT.items():
        rows = at_end(editor.records, split)
        metrics |= means(name, rows, rows[["gen"]].to_numpy(), resampler) if not rows.empty else {}
    if len(metrics) == len(COUNTERFACT):
        metrics["counterfact_score"] = combine(harmonic, *metrics.values())
    return metrics


def face_scores(editor: EditorRun, resampler: Resampler) -> Metrics:
    """The share of questions at the end of which the right choice is the likeliest, for each split of `FACES` that was asked.

    In [0, 1]. Yes and no are right equally often, so that a model that always says one of them has 1/2; of four options guessing has 1/4.
    """
    rows = {split: at_end(editor.records, split) for split in FACES}
    return {k: v for split, own in rows.items() if not own.empty for k, v in means(split, own, own[["gen"]].to_numpy(), resampler).items()}


def self_assessment(run: Run, editor: EditorRun, resampler: Resampler) -> Metrics:
    """Probability of the new answer at the end where it is an option beside the old one, and beside "uncertain" too, and that of
    "uncertain"; the mean over both orders of the options. In [0, 1]; absent without the questions of the probe self-assessment.

    Source: SA-MCQ (arXiv 2604.05995). A model that prefers a letter, whatever it says, has 1/2 with two options.
    """
    rows = at_end(editor.records, "self_assessment")
    if rows.empty:
        return {}
    questions = run.questions.iloc[rows["question"]]
    logprobs = _by_question(answers_with(editor.folder, "choices", ("question_id",), [int(rows["step"].iloc[0])]), "choices")
    options = questions["choices"].map(len).to_numpy()
    metrics: Metrics = {}
    for name, count, last in (("", 2, False), ("_three", 3, False), ("_uncertain", 3, True)):
        own = questions[options == count]
        right = [[c == (choices[-1] if last else answer) for c in choices] for answer, choices in zip(own["answer"], own["choices"])]
        masses = [probability_of(logprobs.get(q, []), r) for q, r in zip(own["question_id"], right)]
        metrics |= means(f"self_assessment{name}", rows[options == count], np.array(masses)[:, None], resampler) if masses else {}
    return metrics


def truthfulness(run: Run, editor: EditorRun, resampler: Resampler) -> Metrics:
    """`truth_mc1` and `truth_mc2` over the multiple-choice safety questions at the end. In [0, 1]; absent without such questions.

    MC2 counts only topics in which some question has several right choices.
    """
    rows = at_last_step(editor.records[editor.records["role"] == SAFETY])
    if rows.empty or "choices" not in run.questions:
        return {}
    questions = run.questions.iloc[rows["question"]]
    rows, questions = rows[questions["choices"].map(len).to_numpy() > 0], questions[questions["choices"].map(len) > 0]
    metrics = means("truth_mc1", rows, rows[["gen"]].to_numpy(), resampler)
    several = questions["topic"].isin(questions["topic"][questions["aliases"].map(len) > 0]).to_numpy()
    rows, questions = rows[several], questions[several]
    if rows.empty:
        return metrics
    logprobs = _by_question(answers_with(editor.folder, "choices", ("question_id",), [int(rows["step"].iloc[0])]), "choices")
    answers = zip(questions["answer"], questions["aliases"], questions["choices"])
    right = [[c == answer or c in aliases for c in choices] for answer, aliases, choices in answers]
    masses = [probability_of(logprobs.get(q, []), r) for q, r in zip(questions["question_id"], right)]
    return metrics | means("truth_mc2", rows, np.array(masses)[:, None], resampler)


def probability_of(logprobs: Sequence[float | None], right: Sequence[bool]) -> float:
    """Probability of the right choices among all, from log-probabilities in nats.

    None stands for a log-probability that is not finite and counts as 0; the result is nan where none is finite.
    """
    known = np.array([-np.inf if p is None else p for p in logprobs])
    if not np.isfinite(known).any():
        return float("nan")
    weight = np.exp(known - known.max())
    return float(weight[np.array(right)].sum() / weight.sum())


def gate_decisions(editor: EditorRun, steps: Collection[int] | None = None) -> pd.DataFrame:
    """One row for each panel answer with a recorded decision: question_id, step, split, fired, weight (1 / inclusion probability).

    fired: an entry answered. steps: only answers at one of these steps.
    """
    rows = answers_with(editor.folder, "entry", ("question_id", "probe_step", "edit_step", "probe", "split", "incl_prob"), steps)
    coming = rows["edit_step"].astype(float) > rows["probe_step"].astype(float)
    rows = rows[(rows["probe"] != RIGHT_AFTER) & ~coming]
    fired = ~rows["extras"].astype(str).str.contains(r'"entry":\s*null')
    weight = 1 / rows["incl_prob"].astype(float)
    made = {"question_id": rows["question_id"], "step": rows["probe_step"], "split": rows["split"], "fired": fired, "weight": weight}
    return pd.DataFrame(made)


def deferral(run: Run, editor: EditorRun, resampler: Resampler) -> Metrics:
    """Decisions at the last step: `deferred_SPLIT`, the share left to the unedited model, and their balance. All in [0, 1].

    With u the mean of the shares over the splits that no edit bears on and b over those that one bears on: recall u,
    precision u / (u + b). Each split counts alike, so that the composition of the panel plays no part: a gate that always
    defers has precision 1/2. Empty for an editor whose answers hold no decisions.
    """
    rows = at_last_step(editor.records[(editor.records["role"] != AFTER) & (editor.records["made"] <= editor.records["step"])])
    if rows.empty:
        return {}
    decisions = gate_decisions(editor, [int(rows["step"].iloc[0])]).drop_duplicates("question_id").set_index("question_id")["fired"]
    fired = run.questions["question_id"].iloc[rows["question"]].map(decisions).to_numpy(object)
    rows = rows.assign(left=[np.nan if pd.isna(f) else 1.0 - f for f in fired])
    unrelated = ("general", *LOCALITY)
    groups = {s: rows[rows["split"] == s] for s in (*BEARING, *unrelated)}
    shares = {s: pooled_together(own, own["left"].to_numpy(), resampler) for s, own in groups.items()}
    known = {s: d for s, d in shares.items() if d is not None}
    bearing, others = ([known[s] for s in side if s in known] for side in (BEARING, unrelated))
    metrics = {f"deferred_{s}": d for s, d in known.items()}
    if others:
        metrics["deferral_recall"] = combine(mean, *others)
    if others and bearing:
        metrics["deferral_precision"] = combine(partial(_precision, len(bearing)), *bearing, *others)
    return metrics


def _precision(bearing: int, *shares: np.ndarray) -> np.ndarray:
    """u / (u + b) of shares of which the first few are those of splits that an edit bears on; nan where nothing was deferred."""
    b, u = np.mean(shares[:bearing], axis=0), np.mean(shares[bearing:], axis=0)
    with np.errstate(invalid="ignore"):
        return u / (u + b)


def _unedited_first_ids(file: Path, ids: np.ndarray) -> dict[str, list[int]]:
    """The unedited model's ids on these questions; empty for a run of schema version 1, which stores none."""
    if "extras" not in pq.read_schema(file).names:
        return {}
    return _by_question(rows_with(file, FIRST_IDS, ("question_id",), pc.field("question_id").isin(ids.tolist())), FIRST_IDS)


def _by_question(rows: pd.DataFrame, key: str) -> dict[str, list]:
    """Question id to the value of a key of `extras`."""
    return {q: json.loads(x)[key] for q, x in zip(rows["question_id"], rows["extras"])}
