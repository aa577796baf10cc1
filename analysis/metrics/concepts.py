"""Metrics of edits of concepts: what instances are said to belong, and how far a generated definition is the new one.

After Wang et al. 2024 (ConceptEdit, arXiv 2403.06259), with two differences. An answer that is neither yes nor no is left out and
counted apart, where the released script counts it as yes; and concept consistency is graded by words, where the paper asks GPT-4.
"""

from __future__ import annotations

import re
from typing import ClassVar

import numpy as np
import pandas as pd

from analysis.metrics.answers import at_end
from analysis.metrics.plugin import AnswerMetric, generated_texts
from analysis.reading.load import EditorRun, Run
from analysis.reading.records import read_table
from testbed.core.grading import content_words
from testbed.core.registry import METRICS

FOLLOW, STAY = "instance_follow", "instance_stay"
_YES_OR_NO = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


def says_yes(text: str | None) -> float:
    """1 for a text that begins with yes and 0 for one that begins with no, in any case; nan for any other."""
    found = _YES_OR_NO.match(text or "")
    return np.nan if found is None else float(found[1].casefold() == "yes")


def consistency(text: str | None, new: str, old: str | None, prompt: str) -> float:
    """The share of the words of the new definition alone that a text holds, less that of the old definition's, in [-1, 1].

    Words that both definitions or the prompt hold do not count; without an old definition nothing is subtracted. nan without a text,
    or where the new definition has no word of its own.
    """
    known, before, said = content_words(prompt), content_words(old or ""), content_words(text or "")
    added, gone = content_words(new) - before - known, before - content_words(new) - known
    if text is None or not added:
        return np.nan
    return len(added & said) / len(added) - (len(gone & said) / len(gone) if gone else 0.0)


class _Instances(AnswerMetric):
    """A number for each answer about an instance at the end."""

    splits: ClassVar[tuple[str, ...]]

    def answers(self, run: Run, editor: EditorRun) -> pd.DataFrame:
        return pd.concat([at_end(editor.records, split) for split in self.splits])

    def belongs(self, run: Run, rows: pd.DataFrame) -> np.ndarray:
        """1 where the right answer is yes, else 0."""
        return np.array([says_yes(answer) for answer in run.questions["answer"].iloc[rows["question"]]])


class _Right(_Instances):
    """The share of right answers among those that are yes or no."""

    better = 1

    def values(self, run: Run, editor: EditorRun, rows: pd.DataFrame) -> np.ndarray:
        said = np.array([says_yes(text) for text in generated_texts(editor, rows)])
        return np.where(np.isnan(said), np.nan, said == self.belongs(run, rows))


@METRICS.register("instance_follow")
class InstanceFollow(_Right):
    """Of instances whose membership the edits changed."""

    summary = "Instances that must follow an edited definition"
    short = "Instances, follow"
    splits = (FOLLOW,)


@METRICS.register("instance_stay")
class InstanceStay(_Right):
    """Of instances whose membership is that before any edit."""

    summary = "Instances that must stay as they are after an edited definition"
    short = "Instances, stay"
    splits = (STAY,)


@METRICS.register("instance_change")
class InstanceChange(_Instances):
    """Of instances that must leave the concept: yes before any edit less yes now, where both answers are yes or no."""

    summary = "Instance Change of ConceptEdit: yes before less yes after, of instances that must leave"
    short = "Instance Change"
    unit = "difference"
    better = 1
    splits = (FOLLOW,)

    def answers(self, run: Run, editor: EditorRun) -> pd.DataFrame:
        rows = super().answers(run, editor)
        return rows[self.belongs(run, rows) == 0]

    def values(self, run: Run, editor: EditorRun, rows: pd.DataFrame) -> np.ndarray:
        stored = read_table(editor.folder.parent / "base" / "answers.parquet", ("question_id", "generated")).to_pydict()
        before = dict(zip(stored["question_id"], stored["generated"]))
        ids = run.questions["question_id"].iloc[rows["question"]]
        pairs = zip((before.get(i) for i in ids), generated_texts(editor, rows))
        return np.array([says_yes(old) - says_yes(new) for old, new in pairs])


@METRICS.register("instance_unparsable")
class InstanceUnparsable(_Instances):
    """The share of answers that are neither yes nor no."""

    summary = "Answers about instances that are neither yes nor no"
    short = "Instances, unparsable"
    better = -1
    splits = (FOLLOW, STAY)

    def values(self, run: Run, editor: EditorRun, rows: pd.DataFrame) -> np.ndarray:
        return np.isnan([says_yes(text) for text in generated_texts(editor, rows)]).astype(float)


@METRICS.register("concept_consistency")
class ConceptConsistency(AnswerMetric):
    """How far the generated definitions are the new ones and not the old ones, of edits with questions about instances."""

    summary = "Concept consistency: words of the new definition less words of the old one"
    short = "Concept consistency"
    unit = "difference"
    better = 1

    def answers(self, run: Run, editor: EditorRun) -> pd.DataFrame:
        rows = at_end(editor.records, "edit")
        concepts = set(run.questions["event_id"][run.questions["split"].isin((FOLLOW, STAY))])
        return rows[run.events["edit_id"].iloc[rows["edit"]].isin(concepts).to_numpy()]

    def values(self, run: Run, editor: EditorRun, rows: pd.DataFrame) -> np.ndarray:
        events, answers = run.events.iloc[rows["edit"]], run.questions["answer"].iloc[rows["question"]]
        olds = [p if isinstance(p, str) else None for p in events["previous"]]
        asked = zip(generated_texts(editor, rows), answers, olds, events["prompt"])
        return np.array([consistency(text, new, old, prompt) for text, new, old, prompt in asked])
