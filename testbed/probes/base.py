"""The contract of a probe: which questions are asked at a moment of the stream, and how panels are drawn.

A probe sees what has been edited, never the model: everything it asks is known before the run, the same for
every editor, so comparisons are paired. Panels are drawn by hashing ids: no state, no order, and a longer
stream extends a panel instead of drawing another.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, TypeVar

from testbed.core.events import EditEvent, Question

T = TypeVar("T")
MIN_STRATUM = 12
FIRST_STRATUM = 64


@dataclass(frozen=True)
class Applied:
    """An edit and the step (1-based) and position (number of edits up to and with it) at which it was made."""

    event: EditEvent
    step: int
    position: int


@dataclass(frozen=True)
class Moment:
    """When a probe is called. `reasons` holds right_after, power, grid, year, end, as they apply.

    edits: edits made up to and with this step. before: edits made before it.
    """

    step: int
    edits: int
    time: float
    reasons: frozenset[str]
    before: int

    @property
    def full(self) -> bool:
        """A moment at which every panel is asked: a year's end, every 500 edits, the end of the stream."""
        return bool(self.reasons & {"year", "grid", "end"})

    @property
    def why(self) -> str:
        """The weightiest reason."""
        return next(r for r in ("end", "year", "grid", "power", "right_after") if r in self.reasons)


@dataclass(frozen=True)
class Benchmark:
    """What may be asked of one benchmark.

    questions: a fixed sample in the order of their draws, so that a smaller panel is a part of a larger one; the same
        for every seed. size: number of items they were drawn from. shots: solved examples in each prompt.
    """

    topic: str
    questions: tuple[Question, ...]
    size: int
    shots: int = 0


@dataclass(frozen=True)
class Past:
    """What has happened up to a moment.

    new: edits of this step. live: all edits that no later one has replaced, oldest first. coming: edits that the run
        will still make, in their order.
    scale: factor on panel sizes that keeps the run within its budget of questions.
    benchmarks: what the run was given to ask besides.
    """

    new: tuple[Applied, ...]
    live: tuple[Applied, ...]
    questions: Callable[[EditEvent], Sequence[Question]]
    general: Sequence[Question]
    seed: int
    scale: float = 1.0
    benchmarks: Sequence[Benchmark] = ()
    coming: tuple[Applied, ...] = ()

    def size(self, n: int) -> int:
        """A panel size within the budget, never under 8."""
        return max(8, round(n * self.scale))


@dataclass(frozen=True)
class Planned:
    """A question to be asked: of which edit, for which panel, and with what probability it got there."""

    question: Question
    panel: str
    edit: Applied | None = None
    incl_prob: float = 1.0


class Probe(ABC):
    """One family of questions; registered with `PROBES.register(name)`, found by scan."""

    name: ClassVar[str]
    summary: ClassVar[str]
    version: ClassVar[int]
    """Raised when the probe asks other questions than before."""

    @abstractmethod
    def ask(self, past: Past, moment: Moment) -> list[Planned]:
        """The questions of this moment; none when it is not this probe's time."""


@lru_cache(1 << 17)  # each panel of each moment draws the same edits again
def draw(seed: int, *ids: str) -> float:
    """A number in [0, 1) that belongs to these ids and the seed, on any machine."""
    digest = hashlib.blake2b("|".join((str(seed), *ids)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def smallest(items: Iterable[T], n: int, key: Callable[[T], float]) -> list[T]:
    """The n items of smallest draw, in their own order."""
    listed = list(items)
    chosen = set(sorted(range(len(listed)), key=lambda i: key(listed[i]))[:n])
    return [x for i, x in enumerate(listed) if i in chosen]


def by_age(past: Past, moment: Moment, n: int, split: str) -> list[tuple[Applied, float]]:
    """About n live edits that a question of this split is about, stratified by age, each with its inclusion probability.

    Strata of ages [0, 64), [64, 128), [128, 256), ... edits. With H strata of N_h such edits among N,
    n_h = max(12, n/2H + n/2 * N_h/N): half spread over ages, half in proportion, so that both the average
    and the newest edits are measured well. The 12 shrinks with the budget too, down to 2. Where all edits have
    questions of all splits, the same edits are asked for each.
    """
    strata: dict[int, list[Applied]] = defaultdict(list)
    among = [a for a in past.live if any(q.split == split for q in past.questions(a.event))]
    for a in among:
        age = moment.edits - a.position
        strata[0 if age < FIRST_STRATUM else math.floor(math.log2(age / FIRST_STRATUM)) + 1].append(a)
    least = max(2, round(MIN_STRATUM * past.scale))
    out: list[tuple[Applied, float]] = []
    for _, group in sorted(strata.items(), reverse=True):
        want = max(least, round(n / (2 * len(strata)) + n / 2 * len(group) / len(among)))
        chosen = smallest(group, min(want, len(group)), lambda a: draw(past.seed, "retention", a.event.id))
        out += [(a, len(chosen) / len(group)) for a in chosen]
    return out


def of_split(past: Past, edit: Applied, split: str) -> Question | None:
    """One question of this split about the edit, always the same one; None where the stream has none."""
    having = [q for q in past.questions(edit.event) if q.split == split]
    return min(having, key=lambda q: draw(past.seed, "question", q.id)) if having else None


def ask_splits(past: Past, edits: Iterable[tuple[Applied, float]], splits: Iterable[str], panel: str) -> list[Planned]:
    """One question of each split about each edit."""
    out = []
    for split in splits:
        for edit, p in edits:
            q = of_split(past, edit, split)
            if q is not None:
                out.append(Planned(q, panel, edit, p))
    return out


def ask_by_age(past: Past, moment: Moment, n: int, splits: Iterable[str]) -> list[Planned]:
    """One question of each split about each of about n live edits that have one."""
    return [q for split in splits for q in ask_splits(past, by_age(past, moment, n, split), (split,), "age_mixed")]
