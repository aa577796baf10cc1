"""Train edits as training examples: which are usable, which are held out, and what one mini-batch draws of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from streams.base import TrainEdit, question_key
from testbed.core.events import Ask, content_id
from testbed.editors.base import BadEditor
from testbed.model.encoding import PromptTooLong, UntokenizableAnswer, answer_ids, prompt_inputs
from testbed.model.handle import ModelHandle

T = TypeVar("T")
_LEAST = 2
"""Entities without which nothing can be trained on and held out."""
MOST_HELD_OUT = 50
"""Held-out edits by which a training is judged at most, so that judging stays cheap."""


@dataclass(frozen=True)
class MetaExample:
    """What one draw takes of a train edit.

    edit: the prompt of the edit. answer: its new answer. rephrasing: another prompt, or picture, of the same question (the edit's
        own where there is none). locality: a question whose answer must stay. kept: that answer, "" where it is not known.
    previous: the answer before the edit, "" where it is not known.
    """

    edit: Ask
    answer: str
    rephrasing: Ask
    locality: Ask
    kept: str
    previous: str = ""


@dataclass(frozen=True)
class MetaExamples:
    """Train edits in two parts that share no entity: those that are trained on, and those by which the training is judged."""

    train: tuple[TrainEdit, ...]
    held_out: tuple[TrainEdit, ...]
    left_out: int
    """Train edits that the model cannot read or answer."""

    @property
    def summary(self) -> str:
        """A clause for the note on the training."""
        alone = sum(not e.rephrasings for e in self.train)
        return (
            f"{len(self.train):,} train edits of {entities(self.train):,} entities, "
            f"{len(self.held_out):,} of {entities(self.held_out):,} held out"
            + (f", {self.left_out:,} that the model cannot read left out" if self.left_out else "")
            + (f", {alone:,} without a rephrasing stand for themselves" if alone else "")
        )


def entity(edit: TrainEdit) -> str:
    """The subject of an edit; where the source names none, its picture, or else its prompt."""
    event = edit.event
    return event.subject or (event.image.key if event.image is not None else event.prompt)


def entities(edits: Sequence[TrainEdit]) -> int:
    """How many entities these edits are about."""
    return len({entity(e) for e in edits})


def examples_of(handle: ModelHandle, edits: Sequence[TrainEdit], share: float, most: int = MOST_HELD_OUT) -> MetaExamples:
    """Divide the usable train edits by entity, in an order of hashes.

    Args:
        share: share of the entities that is held out, one at least.
        most: held-out edits that are kept.

    Raises `BadEditor` where fewer than two entities are usable.
    """
    usable = [e for e in edits if _usable(handle, e)]
    order = sorted({entity(e) for e in usable}, key=lambda name: content_id("held out", name))
    if len(order) < _LEAST:
        raise BadEditor(
            f"this method learns to edit from train edits, and the stream has {len(usable):,} usable ones of {len(order)} entities: choose "
            "a stream with a train part (docs/get-the-files.md)"
        )
    held = set(order[: min(len(order) - 1, max(1, round(share * len(order))))])
    kept = sorted((e for e in usable if entity(e) in held), key=lambda e: content_id("held-out edit", e.event.id))
    train = tuple(e for e in usable if entity(e) not in held)
    return MetaExamples(train, tuple(kept[:most]), len(edits) - len(usable))


def _usable(handle: ModelHandle, edit: TrainEdit) -> bool:
    """Whether the model can tokenise the edit with its answer."""
    try:
        own = len(answer_ids(handle, edit.event.ask(), edit.event.target))
        return prompt_inputs(handle, edit.event.ask())["input_ids"].shape[1] + own < handle.window
    except (UntokenizableAnswer, PromptTooLong):
        return False


def generator_of(seed: int, step: int) -> torch.Generator:
    """The random numbers of one training step, which depend on (seed, step) alone, so that a resumed training draws the same."""
    entropy = np.random.SeedSequence([seed, step, 27]).generate_state(2, dtype=np.uint32)
    return torch.Generator().manual_seed(int(entropy[0]) << 32 | int(entropy[1]))


def drawn(edits: Sequence[TrainEdit], n: int, generator: torch.Generator) -> list[MetaExample]:
    """n different train edits (fewer where there are fewer) with a rephrasing and a locality question of each."""
    order = torch.randperm(len(edits), generator=generator)[:n].tolist()
    return [example(edits[i], edits, generator) for i in order]


def drawn_apart(edits: Sequence[TrainEdit], n: int, generator: torch.Generator) -> list[MetaExample]:
    """As `drawn`, of different questions, so that no edit gives one of them another answer."""
    order = torch.randperm(len(edits), generator=generator).tolist()
    return [example(e, edits, generator) for e in apart([edits[i] for i in order])[:n]]


def apart(edits: Sequence[TrainEdit]) -> list[TrainEdit]:
    """The first edit of each question, in their order."""
    first: dict[tuple[str, str], TrainEdit] = {}
    for edit in edits:
        first.setdefault(question_key(edit.event), edit)
    return list(first.values())


def example(edit: TrainEdit, others: Sequence[TrainEdit], generator: torch.Generator) -> MetaExample:
    """One rephrasing and one locality question of an edit; an edit without one gets the old answer of another entity's edit."""
    rephrasing = _one(edit.rephrasings, generator) if edit.rephrasings else edit.event.ask()
    event, previous = edit.event, edit.event.previous or ""
    if edit.locality:
        question = _one(edit.locality, generator)
        return MetaExample(event.ask(), event.target, rephrasing, question.ask(), question.answer or "", previous)
    apart = [o for o in others if entity(o) != entity(edit)] or [edit]
    other = _one(apart, generator).event
    return MetaExample(event.ask(), event.target, rephrasing, other.ask(), other.previous or "", previous)


def _one(items: Sequence[T], generator: torch.Generator) -> T:
    return items[int(torch.randint(len(items), (1,), generator=generator))]


def data_key(edits: Sequence[TrainEdit]) -> str:
    """A hash of train edits with all their prompts, pictures and questions, for the key of a training."""
    asks = [(a.prompt, a.image.key if a.image is not None else "") for e in edits for a in e.rephrasings]
    return content_id([e.event.id for e in edits], asks, [q.id for e in edits for q in e.locality])
