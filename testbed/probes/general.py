"""Abilities that no edit should touch, and the perplexity of held-out running text."""

from __future__ import annotations

from collections import defaultdict

from testbed.core.events import Question
from testbed.core.registry import PROBES
from testbed.probes.base import Checkpoint, EditHistory, Planned, Probe, draw, smallest


@PROBES.register("general")
class General(Probe):
    """A fixed panel: ten questions of every topic and 24 texts, the same at every full checkpoint."""

    summary = "general abilities by topic, and held-out running text"
    version = 1

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        if not checkpoint.full:
            return []
        topics: dict[tuple[str, str], list[Question]] = defaultdict(list)
        for q in history.general:
            topics[q.split, q.topic].append(q)
        out = []
        for (split, _), group in sorted(topics.items()):
            n = min(len(group), history.size(24 if split == "text" else 10))
            chosen = smallest(group, n, lambda q: draw(history.seed, "general", q.id))
            out += [Planned(q, "fixed_general", None, n / len(group)) for q in chosen]
        return out
