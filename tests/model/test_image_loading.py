"""Pictures decoded ahead in threads: in order, each once, never many at a time, bad ones told."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest

from testbed.core.events import Ask, BadPicture, Picture
from testbed.experiment import preflight
from testbed.experiment.schedule import Schedule
from testbed.model.image_loading import AHEAD, Decoded, decoded
from testbed.model.predictor import ModelPredictor
from tests.helpers.models import build


@dataclass
class Counted:
    """A picture that counts how often it is decoded."""

    key: str
    bad: bool = False
    loads: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def load(self) -> np.ndarray:
        with self.lock:
            self.loads += 1
        if self.bad:
            raise BadPicture(f"picture {self.key} is not a picture")
        return np.full((9, 7, 3), len(self.key), np.uint8)


def test_pictures_come_in_order_each_decoded_once() -> None:
    pictures = [Counted("x" * i, bad=i % 5 == 3) for i in range(1, 40)]
    found = list(decoded(pictures))
    assert [f.key if isinstance(f, Decoded) else str(f) for f in found] == [
        f"picture {p.key} is not a picture" if p.bad else p.key for p in pictures
    ]
    assert {p.loads for p in pictures} == {1}
    assert all(isinstance(f, Picture) and int(f.load()[0, 0, 0]) == len(f.key) for f in found if isinstance(f, Decoded))
    assert list(decoded([])) == []


def test_few_are_decoded_ahead() -> None:
    pictures = [Counted(str(i)) for i in range(100)]
    for used, _ in enumerate(decoded(pictures), 1):
        assert sum(p.loads for p in pictures) <= used + AHEAD


def test_what_preflight_decoded_is_not_decoded_again() -> None:
    handle = build("llava")
    picture = Counted("seen by preflight")
    (found,) = decoded([picture])
    assert preflight._picture_problem(handle, found) is None
    ModelPredictor(handle).generate([Ask("who?", picture), Ask("what?", picture)], 1)
    assert picture.loads == 1
    with pytest.raises(BadPicture, match="and 2 more"):
        preflight._raise(BadPicture, [f"{i}" for i in range(12)])
    assert preflight.check(Schedule(()), handle) is None
