"""Metrics of edits whose target is a document: ROUGE-L and entities of what is generated, and success on questions about it.

Entity recall follows DocMEdit (arXiv 2505.19572): the new entities should stand in the generated text, the old ones should not,
and those that the edit leaves alone should be kept.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd

from analysis.metrics.answers import at_end
from analysis.metrics.plugin import AnswerMetric, SplitSuccess, generated_texts
from analysis.reading.load import EditorRun, Run
from testbed.core.registry import METRICS

LONG = 20
"""Words from which on a target is a document."""


def rouge_l(references: list[str], texts: list[str | None]) -> np.ndarray:
    """ROUGE-L F1 of each text against its reference, in [0, 1]; nan where there is no text. Raises ModuleNotFoundError without
    the package `rouge-score`.

    Source: Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", section 3.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as e:
        raise ModuleNotFoundError("ROUGE-L needs the package rouge-score: install the extra `documents`") from e
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return np.array([np.nan if t is None else scorer.score(r, t)["rougeL"].fmeasure for r, t in zip(references, texts)], float)


class Entities(NamedTuple):
    """What an edit of a document puts in, takes out, and leaves as it is."""

    edited: tuple[str, ...]
    old: tuple[str, ...]
    untouched: tuple[str, ...]


_WORD = re.compile(r"[\w'’-]+")
_NAME = re.compile(r"(?<![.!?] )(?<!^)(?:(?<=\s)|(?<=\())[A-Z0-9][\w'’-]*(?: [A-Z][\w'’-]*)*")
"""A run of words with capitals, or a number, that begins no sentence."""


def entities(target: str, previous: str | None, prompt: str) -> Entities:
    """The entities of a document. Where the one before it is known, the runs of words in which both differ are the edited and the
    old entities; else every name is edited. Names that the prompt holds do not count."""
    named = [n for n in dict.fromkeys(_NAME.findall(target)) if not holds(prompt, n)]
    if previous is None:
        return Entities(tuple(named), (), ())
    new, old = _WORD.findall(target), _WORD.findall(previous)
    spans = [s for s in SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if s[0] != "equal"]
    edited = tuple(dict.fromkeys(" ".join(new[s[3] : s[4]]) for s in spans if s[4] > s[3]))
    gone = tuple(text for s in spans if s[2] > s[1] and not holds(target, text := " ".join(old[s[1] : s[2]])))
    kept = tuple(n for n in named if holds(previous, n) and not any(holds(e, n) for e in edited))
    return Entities(edited, tuple(dict.fromkeys(gone)), kept)


def holds(text: str, phrase: str) -> bool:
    """Whether a phrase stands in a text as whole words, in any case."""
    return f" {' '.join(_WORD.findall(phrase.casefold()))} " in f" {' '.join(_WORD.findall(text.casefold()))} "


def recall(text: str | None, wanted: Sequence[str]) -> float:
    """The share of the entities that a text holds; nan without a text or without entities."""
    return sum(holds(text, w) for w in wanted) / len(wanted) if text is not None and wanted else np.nan


class _EntityShare(AnswerMetric):
    """The share of one kind of entities (a field of `Entities`) in the generated document; with `absent` the share that is absent."""

    better = 1
    kind: ClassVar[int]
    absent: ClassVar[bool] = False

    def answers(self, run: Run, editor: EditorRun) -> pd.DataFrame:
        return _long_answers(run, editor, "edit", LONG)

    def values(self, run: Run, editor: EditorRun, rows: pd.DataFrame) -> np.ndarray:
        events = run.events.iloc[rows["edit"]]
        olds = [p if isinstance(p, str) else None for p in events["previous"]]
        found = [entities(t, p, q)[self.kind] for t, p, q in zip(events["target"], olds, events["prompt"])]
        shares = np.array([recall(text, wanted) for text, wanted in zip(generated_texts(editor, rows), found)], float)
        return 1 - shares if self.absent else shares


@METRICS.register("entities_edited")
class EntitiesEdited(_EntityShare):
    """New entities that the text holds."""

    summary = "Entities of documents: new ones present"
    short = "Entities, new"
    kind = 0


@METRICS.register("entities_old_absent")
class EntitiesOldAbsent(_EntityShare):
    """Old entities that the text does not hold."""

    summary = "Entities of documents: old ones absent"
    short = "Entities, old absent"
    kind = 1
    absent = True


@METRICS.register("entities_untouched")
class EntitiesUntouched(_EntityShare):
    """Entities that the edit leaves alone and the text holds."""

    summary = "Entities of documents: untouched ones kept"
    short = "Entities, untouched"
    kind = 2


def _long_answers(run: Run, editor: EditorRun, split: str, least: int) -> pd.DataFrame:
    """The rows of a split at the end whose right answer has so many words."""
    rows = at_end(editor.records, split)
    words = run.questions["answer"].iloc[rows["question"]].map(lambda a: len(str(a).split()))
    return rows[(words >= least).to_numpy()]


class _Rouge(AnswerMetric):
    """ROUGE-L of the answers to one split against the right answers."""

    better = 1
    split: ClassVar[str]
    least: ClassVar[int] = LONG
    """Fewest words of an answer that counts."""

    def answers(self, run: Run, editor: EditorRun) -> pd.DataFrame:
        return _long_answers(run, editor, self.split, self.least)

    def values(self, run: Run, editor: EditorRun, rows: pd.DataFrame) -> np.ndarray:
        return rouge_l(run.questions["answer"].iloc[rows["question"]].tolist(), generated_texts(editor, rows))


@METRICS.register("rouge_l")
class RougeL(_Rouge):
    """Of the edit's own question."""

    summary = "ROUGE-L of documents"
    short = "ROUGE-L"
    split = "edit"


@METRICS.register("rouge_l_rephrased")
class RougeLRephrased(_Rouge):
    """Of a rephrased question."""

    summary = "ROUGE-L of documents, rephrased question"
    short = "ROUGE-L, rephrased"
    split = "text_generality"


@METRICS.register("rouge_l_sub_question")
class RougeLSubQuestion(_Rouge):
    """Of short answers to questions about a document."""

    summary = "ROUGE-L of answers about documents"
    short = "ROUGE-L, sub-questions"
    split = "sub_question"
    least = 1


@METRICS.register("sub_question_success")
class SubQuestionSuccess(SplitSuccess):
    """Of questions about what an edited document says."""

    summary = "Success on questions about documents"
    short = "Sub-questions"
    split = "sub_question"
