"""What no edit is about, judged by the unedited model's own answers: one fixed panel, and one drawn afresh each time.

A fixed panel gives paired curves. The same questions asked again are no new evidence, though, so a sequential
alarm reads the panel that is drawn afresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from testbed.core.events import Question
from testbed.core.registry import PROBES
from testbed.probes.base import Moment, Past, Planned, Probe, draw, smallest


@PROBES.register("unrelated")
class Unrelated(Probe):
    """48 questions, the same at every full moment."""

    summary = "a fixed panel of questions that no edit is about, judged by the unedited model's answers"
    version = 1

    def ask(self, past: Past, moment: Moment) -> list[Planned]:
        return _panel(past, 48, "fixed_unrelated", "unrelated") if moment.full else []


@PROBES.register("fresh")
class Fresh(Probe):
    """64 questions at every full moment, drawn uniformly and independently of all earlier draws.

    Given everything that happened before, the chance that one of them agrees is the pool's mean under the model
    of that moment: what a test that may be looked at at any time needs. Within a moment they are drawn without
    replacement, which makes a product of bets on them no larger in expectation (negative association).
    """

    summary = "other questions each time from those that no edit is about: for a sequential alarm"
    version = 1

    def ask(self, past: Past, moment: Moment) -> list[Planned]:
        return _panel(past, 64, "rotating_fresh", "fresh", str(moment.step)) if moment.full else []


def _panel(past: Past, n: int, panel: str, *salt: str) -> list[Planned]:
    """The n questions of the pool with the smallest draws, and their share of the pool as inclusion probability."""
    pool = _pool(past)
    chosen = smallest(pool, past.size(n), lambda q: draw(past.seed, *salt, q.id))
    return [Planned(_by_agreement(q), panel, None, len(chosen) / len(pool)) for q in chosen]


def _pool(past: Past) -> Sequence[Question]:
    """General questions of the stream; where it has none, the far-locality questions of live edits."""
    general = [q for q in past.general if q.split == "general"]
    return general or [q for a in past.live for q in past.questions(a.event) if q.split == "locality_far"]


def _by_agreement(question: Question) -> Question:
    """The question judged by what the unedited model says, right or wrong: so its mean before any edit is 1."""
    return replace(question, split="locality_far", answer=None, aliases=(), event_id=None, id="")
