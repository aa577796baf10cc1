"""How hard an edit is for a model: the unedited model's loss on the new answer."""

from __future__ import annotations

from collections.abc import Sequence

from testbed.core.events import EditEvent
from testbed.model.handle import ModelHandle
from testbed.model.predictor import ModelPredictor

DIGITS = 4
"""Losses are rounded to so many decimals, so that the last bits of a sum do not decide an order."""


def losses(handle: ModelHandle, events: Sequence[EditEvent]) -> dict[str, float]:
    """Mean negative log-likelihood (nats a token) of each target given its prompt, teacher-forced, by event id.

    Results are kept on the handle. Raises `BadModel` or `BadPicture` for an event that cannot be asked.
    """
    known: dict[str, float] = handle.cache.setdefault("losses", {})
    new = [e for e in events if e.id not in known]
    scores = ModelPredictor(handle).score([e.ask() for e in new], [e.target for e in new])
    known.update({e.id: round(float(-s.logprobs.mean()), DIGITS) for e, s in zip(new, scores)})
    return {e.id: known[e.id] for e in events}
