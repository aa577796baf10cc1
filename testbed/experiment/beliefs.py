"""Does the model believe the stream? Its old answers are asked before the first edit, and facts can be kept by it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass

from streams.arrange import renumbered
from streams.base import Stream
from testbed.core import grading
from testbed.core.events import EditEvent
from testbed.experiment.config import BadConfig
from testbed.model.handle import ModelHandle
from testbed.model.predictor import ModelPredictor
from testbed.model.progress import bars

ASKED = 100
"""First edits of facts whose old answers are asked at most."""
WARNED = 0.2
"""Share of old answers given under which a stream is warned of."""
_CHUNK = 200
_MOST_DRAWN = 40
"""Edits drawn at most for each edit that is kept."""


@dataclass(frozen=True)
class Belief:
    """What the unedited model makes of the old answers of a run's edits.

    asked: number of facts. generated: share whose generation begins with the old answer. preferred: share whose old answer
    has a higher mean log-probability a token than the target.
    """

    asked: int
    generated: float
    preferred: float

    def stored(self) -> dict[str, float]:
        """The manifest's entry."""
        return asdict(self)

    def lines(self) -> list[str]:
        """What the user is told."""
        shares = f"{self.generated:.0%} by free generation, {self.preferred:.0%} by comparison with the target"
        out = [f"old answers that the model gives: {shares} ({self.asked} facts asked)"]
        if self.generated < WARNED:
            out.append(
                f"the model believes few facts of this stream, so that most edits correct nothing it held and locality is about answers "
                f"that are wrong anyway: stream.keep=believed edits what it holds ({self.generated:.0%} of {self.asked})"
            )
        return out


def belief(handle: ModelHandle, events: Sequence[EditEvent]) -> Belief | None:
    """Ask for the old answers of up to 100 first edits, evenly over the run; None where none has an old answer."""
    known = [e for e in events if e.kind == "add" and e.previous]
    asked = known[:: max(1, -(-len(known) // ASKED))]
    if not asked:
        return None
    predictor, asks = ModelPredictor(handle), [e.ask() for e in asked]
    old, new = (predictor.score(asks, [getattr(e, name) for e in asked]) for name in ("previous", "target"))
    preferred = sum(float(a.logprobs.mean()) > float(b.logprobs.mean()) for a, b in zip(old, new)) / len(asked)
    given = _gives(handle, asked, [e.previous or "" for e in asked])
    return Belief(len(asked), sum(given) / len(asked), preferred)


def _gives(handle: ModelHandle, events: Sequence[EditEvent], answers: Sequence[str]) -> list[bool]:
    said = ModelPredictor(handle).generate([e.ask() for e in events], 12)
    return [grading.begins(s, [a]) for s, a in zip(said, answers)]


def kept_events(stream: Stream, wanted: int, handle: ModelHandle, known: Collection[str] = ()) -> list[EditEvent]:
    """The first `wanted` events of facts that the model believes, or gets wrong, by the stream's `keep`.

    All events of a fact stay together. known: the ids that a run which goes on has kept, so that the model is not asked again.
    Raises `BadConfig` with their number where the stream holds fewer.
    """
    keep, out, chosen = stream.config.keep, list[EditEvent](), dict[str, bool]()
    seen = 0
    with bars() as shown:
        while len(out) < wanted and seen < _MOST_DRAWN * wanted:
            drawn = stream.events(seen + _CHUNK)[seen:]
            if not drawn:
                break
            first = [e for e in drawn if e.revises is None]
            answers = [(e.previous or "") if keep == "believed" else e.target for e in first]
            given = _gives(handle, first, answers) if not known else []
            chosen |= {e.id: bool(a) and g == (keep == "believed") for e, a, g in zip(first, answers, given)}
            chosen |= dict.fromkeys(known, True)
            for e in drawn:
                chosen.setdefault(e.id, chosen.get(e.revises or "", False))
            out += [e for e in drawn if chosen[e.id]]
            seen += len(drawn)
            shown.advance(f"facts that are {keep}", min(len(out), wanted), wanted)
    if len(out) < wanted:
        raise BadConfig(f"stream.keep={keep}: {len(out)} of the {seen} edits asked are {keep}, {wanted} are wanted: use --edits {len(out)}")
    return renumbered(stream, out[:wanted])
