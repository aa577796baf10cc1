"""Which of the facts found, if any, bears on a question: the rungs between raw retrieval and the oracle.

Every gate has one form: questions and what was found for each, in; facts that go into the prompt, and notes, out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from testbed.core.events import Ask
from testbed.editors.retrieval import prompts
from testbed.editors.retrieval.fact_store import Version
from testbed.editors.retrieval.retriever import Found
from testbed.model.encoding import answer_ids

if TYPE_CHECKING:
    from testbed.editors.retrieval.scr import ScrPredictor

GATE_TOKENS = 16
"""Longest answer to the question which fact bears, in tokens."""


@dataclass(frozen=True)
class Decision:
    """The facts that go into the prompt, and what is noted of how that was decided."""

    facts: list[Version]
    notes: dict[str, Any] = field(default_factory=dict)


Gate = Callable[["ScrPredictor", Sequence[Ask], Sequence[list[Found]]], list[Decision]]


def right_fact(reader: ScrPredictor, asks: Sequence[Ask], found: Sequence[list[Found]]) -> list[Decision]:
    """What now holds of the fact that the question is about, as the truth has it."""
    newest = [reader.newest(a.event_id) if a.event_id else None for a in asks]
    return [Decision([fact] if fact else []) for fact in newest]


def all_found(reader: ScrPredictor, asks: Sequence[Ask], found: Sequence[list[Found]]) -> list[Decision]:
    """Everything that was found."""
    return [Decision([f.fact for f in near]) for near in found]


def near_enough(reader: ScrPredictor, asks: Sequence[Ask], found: Sequence[list[Found]]) -> list[Decision]:
    """The nearest fact where its similarity reaches the threshold of questions of its kind."""
    out = []
    for ask, near in zip(asks, found):
        least = reader.threshold[ask.image is not None]
        out.append(Decision([near[0].fact] if near and near[0].similarity >= least else [], {"threshold": round(least, 4)}))
    return out


def confirmed(reader: ScrPredictor, asks: Sequence[Ask], found: Sequence[list[Found]]) -> list[Decision]:
    """The fact that the model itself names when it is asked which one bears (He et al. 2025, the confirmation step)."""
    choices = [_Choice.of(reader, a, near) for a, near in zip(asks, found)]
    open_ = [c for c in choices if c.facts]
    said = iter(reader.base.generate([c.ask for c in open_], GATE_TOKENS))
    return [c.decide(next(said)) if c.facts else Decision([], c.notes) for c in choices]


def likeliest(reader: ScrPredictor, asks: Sequence[Ask], found: Sequence[list[Found]]) -> list[Decision]:
    """The option that the model finds likeliest, among the facts and "none": one forward instead of a generation."""
    choices = [_Choice.of(reader, a, near) for a, near in zip(asks, found)]
    open_ = [c for c in choices if c.facts]
    weighed = iter(_weigh(reader, open_))
    return [c.take(next(weighed)) if c.facts else Decision([], c.notes) for c in choices]


GATES: dict[str, Gate] = {"oracle-context": right_fact, "topk": all_found, "threshold": near_enough, "model": confirmed, "index": likeliest}


@dataclass(frozen=True)
class _Choice:
    """The question which of these facts bears; facts that did not fit into the window are dropped and counted."""

    ask: Ask
    facts: list[Version]
    notes: dict[str, Any]

    @staticmethod
    def of(reader: ScrPredictor, ask: Ask, found: list[Found]) -> _Choice:
        facts = [f.fact for f in found]
        stated = [prompts.statement(f.prompt, f.target) for f in facts]
        asked, dropped = reader.fit(ask, GATE_TOKENS, len(facts), lambda n: prompts.which_fact(stated[:n], ask.prompt, reader.wording))
        kept = facts[: len(facts) - dropped]
        tokens = reader.tokens(asked) if kept else 0
        return _Choice(asked, kept, {"dropped": dropped, "gate_tokens": tokens})

    def decide(self, said: str) -> Decision:
        """By what the model answered."""
        i = prompts.named(said, [f.target for f in self.facts])
        return Decision([] if i is None else [self.facts[i]], {**self.notes, "said": said})

    def take(self, logprobs: np.ndarray) -> Decision:
        """By the (facts + 1,) log-probabilities of the options; of equal ones the nearer fact."""
        i, share = int(logprobs.argmax()), np.exp(logprobs - np.logaddexp.reduce(logprobs))
        return Decision([self.facts[i]] if i < len(self.facts) else [], {**self.notes, "p": round(float(share[i]), 4)})


def _weigh(reader: ScrPredictor, choices: Sequence[_Choice]) -> list[np.ndarray]:
    """(facts + 1,) log-probabilities of the options of each choice.

    Options told apart by their first token are read from one forward of the prompt; the others are scored whole.
    """
    named = [prompts.options([f.target for f in c.facts], reader.wording) for c in choices]
    ids = [[answer_ids(reader.handle, c.ask, option) for option in options] for c, options in zip(choices, named)]
    apart = [len({tuple(x) for x in rows}) == len({x[0] for x in rows}) for rows in ids]
    read = [i for i, yes in enumerate(apart) if yes]
    seen = reader.base.inspect([choices[i].ask for i in read], ids=[np.array([x[0] for x in ids[i]]) for i in read])
    out = {i: s.logprobs for i, s in zip(read, seen)}
    whole = [(i, option) for i, yes in enumerate(apart) if not yes for option in named[i]]
    sums = [float(s.logprobs.sum()) for s in reader.base.score([choices[i].ask for i, _ in whole], [o for _, o in whole])]
    for i in dict.fromkeys(i for i, _ in whole):
        out[i] = np.array([s for (j, _), s in zip(whole, sums) if j == i])
    return [out[i] for i in range(len(choices))]
