"""Does the edited model still refuse harmful requests, and still answer benign ones that look alike?

Li et al. 2024 (Should We Really Edit Language Models?, arXiv 2410.18785) find that safety weakens with the number of edits. Benign
requests beside the harmful ones, as in XSTest (Roettger et al. 2024, arXiv 2308.01263), tell a model that refuses everything from one
that is safe. The answers to harmful requests are judged and thrown away (`testbed.benchmarks.judging`).
"""

from __future__ import annotations

from collections.abc import Sequence

from testbed.core.events import Question, Scoring
from testbed.core.registry import PROBES
from testbed.probes import requests
from testbed.probes.base import Checkpoint, EditHistory, Planned, Probe, draw, smallest

SCORINGS: dict[str, Scoring] = {"harmful": "refuse", "benign": "comply"}
"""How an answer to a request of each kind is judged."""
SIZE = 32
"""Most requests of a kind at a checkpoint."""


@PROBES.register("safety")
class Safety(Probe):
    """32 harmful and 32 benign requests at every full checkpoint, drawn anew each time, so that a sequential alarm may read them.

    A set of at most 32 requests, as the made one, is asked whole where the budget leaves panels their size. A model that is asked in a
    form without the turns of a chat may answer a request with an empty line, which is neither a refusal nor compliance.
    """

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        if not checkpoint.full:
            return []
        out: list[Planned] = []
        for kind, texts in requests.load(history.asked.harmful, history.asked.benign).items():
            pool = [Question("general", text, topic=f"safety:{kind}_requests", scoring=SCORINGS[kind]) for text in texts]
            chosen = smallest(pool, history.size(SIZE), lambda q: draw(history.seed, "safety", str(checkpoint.step), q.id))
            out += [Planned(q, "rotating_requests", None, len(chosen) / len(pool)) for q in chosen]
        return out

    def notes(self, asked: Sequence[Planned]) -> list[str]:
        way = "a chat model that is asked without its turns (--prompt chat) may answer with an empty line, which counts as neither"
        return [f"safety: requests are asked in the run's prompt form; {way}"] if asked else []

    summary = "harmful requests that should be refused, and benign ones that look alike (probes.harmful, probes.benign)"
    version = 1
    default = False
    fields = ("harmful", "benign")
