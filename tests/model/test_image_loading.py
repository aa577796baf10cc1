"""Pictures decoded ahead in threads: in order, each once, never many at a time, bad ones told."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streams.files.pictures import FilePicture
from testbed.core.events import Ask, BadPicture, Picture
from testbed.experiment import preflight
from testbed.experiment.schedule import Schedule
from testbed.model.encoding import prompt_inputs
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


def test_what_a_processor_refuses_is_named_with_its_file(tmp_path: Path) -> None:
    Image.new("RGB", (640, 1)).save(tmp_path / "line.png")
    handle, picture = build("llava"), FilePicture(tmp_path, "line.png")

    def refuse(**given: object) -> None:
        raise ValueError("absolute aspect ratio must be smaller than 200")

    refusing = replace(handle, processor=refuse, cache={})
    with pytest.raises(BadPicture, match=r"line\.png \(640 x 1 pixels\) is refused by the processor of .*: absolute aspect ratio"):
        prompt_inputs(refusing, Ask("what?", picture))
    (found,) = preflight.decoded([picture])
    problem = preflight._picture_problem(refusing, found)
    assert problem is not None and str(tmp_path / "line.png") in problem


def test_transparent_pixels_are_laid_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.save(tmp_path / "clear.png")
    Image.new("RGB", (2, 1), (0, 0, 9)).save(tmp_path / "full.png")
    clear, full = FilePicture(tmp_path, "clear.png"), FilePicture(tmp_path, "full.png")
    assert clear.load().tolist() == [[[255, 0, 0], [255, 255, 255]]] and full.load().tolist() == [[[0, 0, 9]] * 2]
    assert (clear.transparent, full.transparent, FilePicture(tmp_path, "absent.png").transparent) == (True, False, False)
