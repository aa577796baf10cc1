"""Functions that turn facts into a schedule of edits; each is deterministic in its generator, and they compose.

    order  = shuffled(n, rng)  or  drifting(categories, rng)
    events = dated(changes((facts[i] for i in order), shares, values, rng), calendar(per_year, bursts, rng))

`scheduled` is the composition for a configuration. Every function is a generator and draws as it goes, so the first k
events never depend on how many are taken. Orders that depend on that number are in `streams.arrange`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from streams.base import StreamConfig
from streams.files.records import normalize
from testbed.core.events import EditEvent, Kind, Picture, content_id

Values = Mapping[str, Sequence[str]]
"""For each relation the values that a revision may draw from."""
MAX_CHANGES = 4
"""Most events of one fact (its `add` included) unless `Shares.repeats` asks for more: bounds the stream, and how
often one fact is rewritten."""


@dataclass(frozen=True, slots=True)
class EditableFact:
    """A fact that can be edited: its answer before any edit (`previous`), and the first value that it gets (`target`).

    `source` names the record and is unique in a stream. `aliases` are as right as `previous` and never drawn as a
    new target. `relation` is the category whose values may replace the target.
    """

    prompt: str
    target: str
    source: str
    image: Picture | None = None
    previous: str | None = None
    subject: str | None = None
    relation: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Shares:
    """Shares of the kinds among all edits, each in [0, 1), together under 1.

    The rest are of kind `add`; each of those is followed at once by `repeats` - 1 revisions of its fact.
    """

    revise: float = 0.0
    revert: float = 0.0
    retire: float = 0.0
    repeats: int = 1

    def kind(self, u: float) -> Kind:
        """The kind that a uniform draw u in [0, 1) falls on."""
        if u < self.revise:
            return "revise"
        if u < self.revise + self.revert:
            return "revert"
        return "retire" if u < self.revise + self.revert + self.retire else "add"


@dataclass(frozen=True)
class FactChange:
    """One change of a fact, without a date yet; `target` is empty for a retire."""

    kind: Kind
    fact: EditableFact
    target: str
    previous: str | None


@dataclass
class _FactHistory:
    """A fact that has been added: every value that it had, oldest first, and the number of its events."""

    fact: EditableFact
    values: list[str]
    changes: int = 1
    seen: set[str] = field(default_factory=set)


def generator(seed: int, name: str) -> np.random.Generator:
    """A separate random generator for each named purpose, so that the draws of one purpose never move those of another."""
    return np.random.default_rng([seed, int(content_id(name), 16)])


def hash_fraction(*parts: object) -> float:
    """A number in [0, 1) from a hash of the content, uniform over contents; splits of records use it, so no seed moves them."""
    return int(content_id(*parts)[:13], 16) / 16**13


def shuffled(n: int, rng: np.random.Generator) -> Iterator[int]:
    """The positions 0..n-1 in a random order."""
    return iter(rng.permutation(n).tolist())


def drifting(categories: Sequence[str], rng: np.random.Generator, strength: float = 2.0) -> Iterator[int]:
    """The positions of `categories` in an order whose mix of categories moves over time.

    At fraction t of the way the next category is drawn from softmax((1 - t) a + t b) over the categories that are not
    used up; a and b hold a normal draw with standard deviation `strength` for each category.
    """
    left: dict[str, list[int]] = {}
    for i in rng.permutation(len(categories)).tolist():
        left.setdefault(str(categories[i]), []).append(i)
    names = sorted(left)
    a, b = rng.normal(0.0, strength, (2, len(names)))
    remaining = np.array([len(left[name]) for name in names])
    for step in range(len(categories)):
        t = step / len(categories)
        logits = np.where(remaining > 0, (1 - t) * a + t * b, -np.inf)
        weights = np.exp(logits - logits.max())
        pick = min(int(np.searchsorted(np.cumsum(weights), rng.random() * weights.sum(), side="right")), len(names) - 1)
        pick = pick if remaining[pick] else int(np.argmax(logits))
        remaining[pick] -= 1
        yield left[names[pick]].pop()


def changes(facts: Iterable[EditableFact], shares: Shares, values: Values, rng: np.random.Generator) -> Iterator[FactChange]:
    """Add the facts in order and, at the given shares, revise, revert or retire facts already added.

    A revision takes a value of the same relation from `values` that the fact never had; it also replaces a revert or
    retire that would change nothing. When no new fact is left, revisions replace additions, until every fact has had
    `MAX_CHANGES` events, is retired, or has no new value left: then the stream ends. A retired fact stays retired.
    """
    most = max(MAX_CHANGES, shares.repeats)
    fresh = iter(facts)
    pending = next(fresh, None)
    live: list[_FactHistory] = []
    while pending is not None or live:
        kind, at = shares.kind(rng.random()), rng.random()
        if pending is not None and (kind == "add" or not live):
            history = _new_history(pending)
            yield FactChange("add", pending, pending.target, pending.previous)
            for _ in range(shares.repeats - 1):
                if (change := _change("revise", history, values, rng)) is None:
                    break  # no new value is left
                yield change
            if history.changes < most:
                live.append(history)
            pending = next(fresh, None)
            continue
        index = int(at * len(live))
        change = _change(kind, live[index], values, rng)
        if change is None or change.kind == "retire" or live[index].changes >= most:
            live[index] = live[-1]
            live.pop()
        if change is not None:
            yield change


def calendar(per_year: int, bursts: float, rng: np.random.Generator) -> Iterator[float]:
    """Times of events in years, without end; years count from 1, and the fraction is the position within the year.

    A year holds `per_year` events or, with `bursts` > 0, a number drawn from a gamma distribution with that mean
    and `bursts` times that as standard deviation, at least 1.
    """
    if not bursts:
        yield from (1 + seq / per_year for seq in count())
    for year in count(1):
        size = max(1, round(rng.gamma(bursts**-2, per_year * bursts**2)))
        yield from (year + i / size for i in range(size))


def dated(stream: Iterable[FactChange], times: Iterable[float]) -> Iterator[EditEvent]:
    """The changes as events at these times, in years."""
    newest: dict[str, str] = {}
    for seq, (change, time) in enumerate(zip(stream, times)):
        fact = change.fact
        event = EditEvent(
            kind=change.kind,
            time=time,
            seq=seq,
            prompt=fact.prompt,
            target=change.target,
            image=fact.image,
            previous=change.previous,
            subject=fact.subject,
            relation=fact.relation,
            revises=None if change.kind == "add" else newest[fact.source],
            source=fact.source,
        )
        newest[fact.source] = event.id
        yield event


def scheduled(facts: Sequence[EditableFact], values: Values, config: StreamConfig, purpose: str = "") -> Iterator[EditEvent]:
    """The events of undated facts under a configuration; `purpose` prefixes the names of the random generators."""

    def draws(name: str) -> np.random.Generator:
        return generator(config.seed, purpose + name)

    if config.drift:
        order = drifting([f.relation or "" for f in facts], draws("order"))
    else:
        order = shuffled(len(facts), draws("order"))
    shares = Shares(config.revise, config.revert, config.retire, config.repeats)
    changed = changes((facts[i] for i in order), shares, values, draws("changes"))
    return dated(changed, calendar(config.edits_per_year, config.bursts, draws("years")))


def _new_history(fact: EditableFact) -> _FactHistory:
    values = [v for v in (fact.previous, fact.target) if v is not None]
    return _FactHistory(fact, values, seen={normalize(v) for v in (*values, *fact.aliases)})


def _change(kind: Kind, history: _FactHistory, values: Values, rng: np.random.Generator) -> FactChange | None:
    """The next change of a fact, which is added to its history; None when a revision finds no new value."""
    current = history.values[-1]
    history.changes += 1
    if kind == "retire" and current != history.fact.previous:
        return FactChange("retire", history.fact, "", current)
    earlier = list(dict.fromkeys(v for v in history.values if normalize(v) != normalize(current)))
    if kind == "revert" and earlier:
        target = earlier[int(rng.integers(len(earlier)))]
        history.values.append(target)
        return FactChange("revert", history.fact, target, current)
    target = _new_value(history, values.get(history.fact.relation or "", ()), rng)
    if target is None:
        return None
    history.values.append(target)
    history.seen.add(normalize(target))
    return FactChange("revise", history.fact, target, current)


def _new_value(history: _FactHistory, pool: Sequence[str], rng: np.random.Generator) -> str | None:
    """A value of the pool that the fact never had: the first one from a random position on."""
    if not pool:
        return None
    start = int(rng.integers(len(pool)))
    return next((v for v in (*pool[start:], *pool[:start]) if normalize(v) not in history.seen), None)
