"""The history of the simulated world: changes of its facts, drawn one after another.

Each change depends only on the changes before it, so the first k changes do not depend on how many are taken. A change
may cause another one of the same entity (a new leader brings a new ally).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from streams import transforms
from streams.base import StreamConfig
from streams.world.facts import World, WorldFact
from testbed.core.events import Kind

CASCADE = 0.2
"""Probability that a change whose relation has a `cascade` causes another one."""
DRIFT_EDITS = 500
"""With `drift`, the number of changes over which the mix of relations moves from its first state to its last."""


@dataclass(frozen=True, slots=True)
class WorldChange:
    """One change of a fact.

    `fact` is the fact at the start, `previous` and `value` are its values before and after the change (after a retire
    the start value), `revises` is the number of the change that this one replaces, `cascade_of` that of its cause.
    """

    number: int
    kind: Kind
    fact: WorldFact
    previous: str
    value: str
    revises: int | None
    cascade_of: int | None


@dataclass
class _FactValues:
    """The values of one fact so far (the last is the present one), and the number of its last change, -1 before it."""

    values: list[str]
    last: int


@dataclass
class _Pool:
    """A set of facts from which one is drawn with its hazard as weight, by rejection; every operation takes O(1)."""

    items: list[WorldFact] = field(default_factory=list)
    _position: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, fact: WorldFact) -> None:
        self._position[_key(fact)] = len(self.items)
        self.items.append(fact)

    def remove(self, fact: WorldFact) -> None:
        at = self._position.pop(_key(fact))
        last = self.items.pop()
        if at < len(self.items):
            self.items[at] = last
            self._position[_key(last)] = at

    def draw(self, rng: np.random.Generator, top: float, mix: Mapping[str, float]) -> WorldFact:
        """A fact with probability in proportion to its hazard times the weight (at most 1) of its relation."""
        while True:
            fact = self.items[int(rng.integers(len(self.items)))]
            if rng.random() * top < fact.relation.hazard * mix.get(fact.relation.name, 1.0):
                return fact


def _key(fact: WorldFact) -> tuple[int, int]:
    return fact.entity.index, fact.slot


class History:
    """Changes of the editable facts of a world.

    Args:
        world: the world that changes.
        config: shares of revise, revert and retire, repeats, drift; `seed` picks the history.
        slots: which relations may change (all by default).
    """

    def __init__(self, world: World, config: StreamConfig, slots: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        self.world, self.config, self.slots = world, config, slots
        self._rng = np.random.default_rng([world.seed, world.size, 23, config.seed])
        self._fresh, self._edited = _Pool(), _Pool()
        self._tracks: dict[tuple[int, int], _FactValues] = {}
        for fact in world.facts():
            if not fact.frozen and fact.slot in slots:
                self._fresh.add(fact)
        self._top = max(f.relation.hazard for f in self._fresh.items)
        self._changes: list[WorldChange] = []
        self._again = 0
        names = sorted({f.relation.name for f in self._fresh.items})
        drift = transforms.generator(config.seed, "world drift").normal(0.0, 1.0, (2, len(names))) if config.drift else None
        self._drift = (names, drift)

    def first(self, n: int) -> list[WorldChange]:
        """The first n changes; the history has no end."""
        while (number := len(self._changes)) < n:
            self._changes.append(self._repeat(number) or self._cascade(number) or self._independent(number))
        return self._changes[:n]

    def _repeat(self, number: int) -> WorldChange | None:
        """A revision of a fact that was just edited for the first time, until it has had `repeats` values."""
        if self._changes and self._changes[-1].kind == "add":
            self._again = self.config.repeats - 1
        if not self._again:
            return None
        self._again -= 1
        last = self._changes[-1]
        return self._change(number, last.fact, last.cascade_of)

    def _mix(self, number: int) -> dict[str, float]:
        """Weights of the relations, proportional to softmax((1 - t) a + t b) at fraction t of the way, the largest 1."""
        names, drift = self._drift
        if drift is None:
            return {}
        t = min(1.0, number / DRIFT_EDITS)
        logits = (1 - t) * drift[0] + t * drift[1]
        return dict(zip(names, np.exp(logits - logits.max()).tolist()))

    def _cascade(self, number: int) -> WorldChange | None:
        """A change that the one before it causes; None where it causes none."""
        cause = self._changes[-1] if self._changes else None
        if cause is None or cause.kind not in ("add", "revise") or cause.cascade_of is not None:
            return None
        slot = cause.fact.relation.cascade
        if slot is None or slot not in self.slots or self._rng.random() >= CASCADE:
            return None
        fact = self.world.fact(cause.fact.entity, slot)
        return None if fact.frozen else self._change(number, fact, cause.number)

    def _independent(self, number: int) -> WorldChange:
        share, c, mix = self._rng.random(), self.config, self._mix(number)
        if self._edited.items and share < c.retire + c.revert:
            fact = self._edited.draw(self._rng, self._top, mix)
            track = self._tracks[_key(fact)]
            if track.values[-1] != fact.value and share < c.retire:
                return self._record(number, "retire", fact, fact.value, None)
            if len(track.values) > 1:
                track.values.pop()
                return self._record(number, "revert", fact, track.values[-1], None, popped=True)
        again = self._edited.items and (share < c.retire + c.revert + c.revise or not self._fresh.items)
        pool = self._edited if again else self._fresh
        return self._change(number, pool.draw(self._rng, self._top, mix), None)

    def _change(self, number: int, fact: WorldFact, cascade_of: int | None) -> WorldChange:
        values = self.world.vocabularies[fact.relation.values]
        track = self._tracks.get(_key(fact))
        excluded = {fact.value, track.values[-1] if track else fact.value, fact.entity.name}
        while (value := values[int(self._rng.integers(len(values)))]) in excluded:
            continue
        return self._record(number, "revise" if track else "add", fact, value, cascade_of)

    def _record(self, number: int, kind: Kind, fact: WorldFact, value: str, cascade_of: int | None, popped: bool = False) -> WorldChange:
        track = self._tracks.get(_key(fact))
        if track is None:
            self._fresh.remove(fact)
            self._edited.add(fact)
            track = self._tracks[_key(fact)] = _FactValues([fact.value], -1)
        previous = self._changes[track.last].value if track.last >= 0 else fact.value
        change = WorldChange(number, kind, fact, previous, value, track.last if track.last >= 0 else None, cascade_of)
        if kind == "retire":
            track.values = [fact.value]
        elif not popped:
            track.values.append(value)
        track.last = number
        return change
