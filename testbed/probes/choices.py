"""The scores that papers print for CounterFact: is the new answer likelier than the old one?"""

from __future__ import annotations

from testbed.core.registry import PROBES
from testbed.probes.base import Checkpoint, EditHistory, Planned, Probe, ask_at_full


@PROBES.register("choices")
class Choices(Probe):
    """48 live edits (96 at the end) with one paraphrase and one neighbour each.

    Meng et al. 2022 (ROME, section 3.2 of the appendix on CounterFact) compare the probabilities of both answers, each the mean
    over its tokens. Asked of those streams alone whose `compares` is set.
    """

    summary = "new answer against old one, as papers score CounterFact: efficacy, paraphrase and neighbourhood score"
    version = 1

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        return ask_at_full(history, checkpoint, 48, ("choice_edit", "choice_generality", "choice_locality"))
