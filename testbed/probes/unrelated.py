"""Questions that no edit is about, judged by the unedited model's own answers: a fixed panel, and one drawn anew each time.

A fixed panel gives paired curves. A question that is asked again is no new evidence, though, so a sequential
alarm reads the panel that is drawn anew at each checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from testbed.core.events import Question
from testbed.core.registry import PROBES
from testbed.probes.base import Checkpoint, EditHistory, Planned, Probe, draw, smallest


@PROBES.register("unrelated")
class Unrelated(Probe):
    """48 questions, the same at every full checkpoint."""

    summary = "a fixed panel of questions that no edit is about, judged by the unedited model's answers"
    version = 1

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        return _panel(history, 48, "fixed_unrelated", "unrelated") if checkpoint.full else []


@PROBES.register("fresh")
class Fresh(Probe):
    """64 questions at every full checkpoint, drawn uniformly and independently of all earlier draws.

    Given everything that happened before, the probability that a question agrees is the pool's mean under the model
    of that checkpoint, which an anytime-valid test needs. Within a checkpoint the questions are drawn without
    replacement, which makes a product of bets on them no larger in expectation (negative association).
    """

    summary = "other questions each time from those that no edit is about: for a sequential alarm"
    version = 1

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        return _panel(history, 64, "rotating_fresh", "fresh", str(checkpoint.step)) if checkpoint.full else []


def _panel(history: EditHistory, n: int, panel: str, *salt: str) -> list[Planned]:
    """The n questions of the pool with the smallest draws, and their share of the pool as inclusion probability."""
    pool = _pool(history)
    chosen = smallest(pool, history.size(n), lambda q: draw(history.seed, *salt, q.id))
    return [Planned(_by_agreement(q), panel, None, len(chosen) / len(pool)) for q in chosen]


def _pool(history: EditHistory) -> Sequence[Question]:
    """General questions of the stream; where it has none, the far-locality questions of live edits."""
    general = [q for q in history.general if q.split == "general"]
    return general or [q for a in history.live for q in history.questions(a.event) if q.split == "locality_far"]


def _by_agreement(question: Question) -> Question:
    """The question, judged by the unedited model's answer, right or wrong, so that its mean before any edit is 1."""
    return replace(question, split="locality_far", answer=None, aliases=(), event_id=None, id="")
