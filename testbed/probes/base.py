"""The contract of a probe: which questions it asks at a checkpoint of the stream, and how it draws panels of them.

A probe sees which edits were made, never the model. All its questions are therefore known before the run and are the
same for every editor, so that comparisons of editors are paired. Panels are drawn by hashing ids: a draw depends on no
state and on no order, and a longer stream extends a panel instead of drawing another one.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, TypeVar

from testbed.core.events import EditEvent, Question
from testbed.core.ranges import PositiveInt, out_of_range
from testbed.core.registry import PROBES
from testbed.probes import requests

T = TypeVar("T")
MIN_STRATUM = 12
"""Fewest edits drawn from an age stratum at full budget."""
FIRST_STRATUM = 64
"""Width of the youngest age stratum, in edits; each older one is twice as wide as the one before."""


@dataclass(frozen=True)
class ProbeConfig:
    """What is asked (`--set probes.FIELD=VALUE`)."""

    paraphrases: PositiveInt = 1
    """Held-out paraphrases of an edit in a panel, where the stream has as many; panels hold fewer edits for it (papers: 1 to 10)."""
    end: PositiveInt = 1
    """How many times larger the panels of the last checkpoint are, which tables read, where the budget shrinks panels."""
    also: tuple[str, ...] = ()
    """Probes that are asked beside the usual ones, with which they share the budget (self-assessment, persistence, generation)."""
    harmful: Path | None = None
    """File of requests that a model should refuse, in place of the made ones: JSON lines with `prompt`, or text, one request a line."""
    benign: Path | None = None
    """File of requests that look alike and that a model should answer, in the same forms."""

    def problems(self) -> list[str]:
        """A sentence for each name that is no probe or a probe that is asked anyway, and for each file that is not read or unreadable."""
        found = dict(PROBES.items())
        wrong = [name for name in self.also if name not in found or found[name].default]
        offered = ", ".join(sorted(name for name, cls in found.items() if not cls.default))
        out = [f"also names {name!r}; it takes probes that are not asked by default: {offered}" for name in wrong]
        own = [(f, name) for name, cls in found.items() for f in cls.fields if getattr(self, f) is not None and name not in self.also]
        out += [f"{field} is given, but only the probe {name} reads it: add {name} to probes.also" for field, name in own]
        try:
            requests.load(self.harmful, self.benign)
        except requests.BadRequests as e:
            out.append(str(e))
        return out_of_range(self) + out


@dataclass(frozen=True)
class Applied:
    """An edit, its step (1-based) and its position (the number of edits made up to and including it)."""

    event: EditEvent
    step: int
    position: int


@dataclass(frozen=True)
class Checkpoint:
    """The end of a step of the run, at which probes are called.

    step: number of the step, 1-based. time: time of its last edit. reasons: those of right_after, power, grid, year
    and end that apply. edits: number of edits made up to and including this step. before: number made before it.
    """

    step: int
    edits: int
    time: float
    reasons: frozenset[str]
    before: int

    @property
    def full(self) -> bool:
        """True where every panel is asked: at a year's end, every 500 edits, and at the end of the stream."""
        return bool(self.reasons & {"year", "grid", "end"})

    @property
    def why(self) -> str:
        """The most important reason, which is stored with the records."""
        return next(r for r in ("end", "year", "grid", "power", "right_after") if r in self.reasons)


@dataclass(frozen=True)
class Benchmark:
    """The questions of one benchmark.

    questions: a fixed sample, the same for every seed, in the order of its draws, so that a smaller panel is a part of
        a larger one. size: number of items it was drawn from. shots: solved examples in each prompt.
    """

    topic: str
    questions: tuple[Question, ...]
    size: int
    shots: int = 0


@dataclass(frozen=True)
class EditHistory:
    """The edits of a run up to a checkpoint, and what a probe may ask about.

    new: edits of this step. live: all edits that no later one has replaced, oldest first. coming: edits that the run
        will still make, in their order. questions: the stream's questions about an edit. general: its questions about
        no edit. seed: seed of the run. scale: factor on panel sizes that keeps the run within its budget of questions.
    benchmarks: benchmarks that the user named with --benchmarks. asked: what the user asks for with --set probes.FIELD.
    """

    new: tuple[Applied, ...]
    live: tuple[Applied, ...]
    questions: Callable[[EditEvent], Sequence[Question]]
    general: Sequence[Question]
    seed: int
    scale: float = 1.0
    benchmarks: Sequence[Benchmark] = ()
    coming: tuple[Applied, ...] = ()
    asked: ProbeConfig = ProbeConfig()

    def size(self, n: int, least: int = 8) -> int:
        """A panel size within the budget; not under `least` as long as panels keep a tenth of their size, never under 2."""
        return max(round(n * self.scale), min(least, max(2, round(10 * least * self.scale))))


@dataclass(frozen=True)
class Planned:
    """A question that a probe asks, its panel, the edit that it is about (None: no edit), and its inclusion probability."""

    question: Question
    panel: str
    edit: Applied | None = None
    incl_prob: float = 1.0


class Probe(ABC):
    """One family of questions; registered with `PROBES.register(name)`, found by scan."""

    name: ClassVar[str]
    summary: ClassVar[str]
    version: ClassVar[int]
    """To be raised whenever the probe begins to ask other questions, because records store it."""
    default: ClassVar[bool] = True
    """False for a probe that is asked only where `--set probes.also` names it, because others would be asked less for it."""
    fields: ClassVar[tuple[str, ...]] = ()
    """Fields of `ProbeConfig` that this probe alone reads; one that is given without the probe is an error."""

    @abstractmethod
    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        """The questions of this checkpoint; an empty list where the probe asks nothing."""

    def notes(self, asked: Sequence[Planned]) -> list[str]:
        """What a reader must know about the questions that this probe asks in a run, a line each."""
        return []


@lru_cache(1 << 17)  # each panel of each checkpoint draws the same edits again
def draw(seed: int, *ids: str) -> float:
    """A hash of the seed and the ids as a number in [0, 1), the same on any machine."""
    digest = hashlib.blake2b("|".join((str(seed), *ids)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def smallest(items: Iterable[T], n: int, key: Callable[[T], float]) -> list[T]:
    """The n items with the smallest key, in their original order."""
    listed = list(items)
    chosen = set(sorted(range(len(listed)), key=lambda i: key(listed[i]))[:n])
    return [x for i, x in enumerate(listed) if i in chosen]


def by_age(history: EditHistory, checkpoint: Checkpoint, n: int, split: str) -> list[tuple[Applied, float]]:
    """About n live edits that a question of this split is about, stratified by age, each with its inclusion probability.

    Strata hold the ages [0, 64), [64, 128), [128, 256), ... edits. With H strata of N_h such edits among N,
    n_h = max(12, n/2H + n/2 * N_h/N): half is spread evenly over ages and half in proportion, so that both the average
    and the newest edits are measured well. The 12 shrinks with the budget too, down to 2. Where all edits have
    questions of all splits, the same edits are drawn for each split.
    """
    strata: dict[int, list[Applied]] = defaultdict(list)
    among = [a for a in history.live if any(q.split == split for q in history.questions(a.event))]
    for a in among:
        age = checkpoint.edits - a.position
        strata[0 if age < FIRST_STRATUM else math.floor(math.log2(age / FIRST_STRATUM)) + 1].append(a)
    least = max(2, round(MIN_STRATUM * history.scale))
    out: list[tuple[Applied, float]] = []
    for _, group in sorted(strata.items(), reverse=True):
        want = max(least, round(n / (2 * len(strata)) + n / 2 * len(group) / len(among)))
        chosen = smallest(group, min(want, len(group)), lambda a: draw(history.seed, "retention", a.event.id))
        out += [(a, len(chosen) / len(group)) for a in chosen]
    return out


def of_split(history: EditHistory, edit: Applied, split: str, n: int = 1) -> list[Question]:
    """n questions of this split about the edit, or as many as the stream has, the same ones at every checkpoint."""
    having = sorted((q for q in history.questions(edit.event) if q.split == split), key=lambda q: draw(history.seed, "question", q.id))
    return having[:n]


def ask_splits(
    history: EditHistory, edits: Iterable[tuple[Applied, float]], splits: Iterable[str], panel: str, n: int = 1
) -> list[Planned]:
    """n questions of each split about each edit."""
    return [Planned(q, panel, edit, p) for split in splits for edit, p in edits for q in of_split(history, edit, split, n)]


def ask_by_age(history: EditHistory, checkpoint: Checkpoint, n: int, splits: Iterable[str]) -> list[Planned]:
    """One question of each split, and so many paraphrases as the run asks, about each of about n live edits that have one."""
    number = {"text_generality": history.asked.paraphrases}
    edits = {split: by_age(history, checkpoint, n, split) for split in splits}
    return [q for split in edits for q in ask_splits(history, edits[split], (split,), "age_mixed", number.get(split, 1))]


def ask_where_replaced(history: EditHistory, checkpoint: Checkpoint, questions: Callable[[Applied], list[Question]]) -> list[Planned]:
    """These questions about each of about 24 live edits (48 at the end) whose old answer is known; none between full checkpoints."""
    if not checkpoint.full:
        return []
    known = tuple(a for a in history.live if (a.event.previous or a.event.target) != a.event.target)
    edits = by_age(replace(history, live=known), checkpoint, history.size(48 if "end" in checkpoint.reasons else 24), "edit")
    return [Planned(q, "age_mixed", edit, p) for edit, p in edits for q in questions(edit)]


def ask_at_full(history: EditHistory, checkpoint: Checkpoint, n: int, splits: Iterable[str]) -> list[Planned]:
    """One question of each split about each of about n live edits, 2n at the end of the stream; none between full checkpoints."""
    if not checkpoint.full:
        return []
    return ask_by_age(history, checkpoint, history.size(2 * n if "end" in checkpoint.reasons else n), splits)
