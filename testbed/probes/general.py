"""Abilities that no edit should touch, and the perplexity of held-out running text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from testbed.core.events import Question
from testbed.core.registry import PROBES
from testbed.probes.base import Checkpoint, EditHistory, Planned, Probe, draw, smallest

_TOPICS = 10
"""Most topics of one split that are drawn from apart."""


@PROBES.register("general")
class General(Probe):
    """A fixed panel: ten questions of every topic and 24 texts, the same at every full checkpoint.

    Where a split has more than ten topics, the nine largest are drawn from one by one and all others together.
    """

    summary = "general abilities by topic, and held-out running text"
    version = 2

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        if not checkpoint.full:
            return []
        out = []
        for split, groups in _by_topic(history.general).items():
            for group in groups:
                n = min(len(group), history.size(24 if split == "text" else 10, least=-(-8 // len(groups))))
                chosen = smallest(group, n, lambda q: draw(history.seed, "general", q.id))
                out += [Planned(q, "fixed_general", None, n / len(group)) for q in chosen]
        return out


def _by_topic(questions: Sequence[Question]) -> dict[str, list[list[Question]]]:
    """By split, the questions of each topic; of more than ten topics those of the nine largest, and all others in one list."""
    topics: dict[str, dict[str, list[Question]]] = defaultdict(lambda: defaultdict(list))
    for q in questions:
        topics[q.split][q.topic].append(q)
    out = {}
    for split, by_name in sorted(topics.items()):
        largest = sorted(by_name, key=lambda t: (-len(by_name[t]), t))
        apart = largest if len(largest) <= _TOPICS else largest[: _TOPICS - 1]
        others = [q for t in sorted(set(by_name) - set(apart)) for q in by_name[t]]
        out[split] = [by_name[t] for t in sorted(apart)] + ([others] if others else [])
    return out
