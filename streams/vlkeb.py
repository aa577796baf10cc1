"""`vlkeb-yearly`: VLKEB's questions about pictured entities, on a yearly schedule."""

from __future__ import annotations

from streams._entries import EntryStream
from streams._entry import Data
from streams._mmedit import Layout, load
from streams.base import StreamConfig
from testbed.registry import STREAMS


def opening(question: str, target: str) -> str:
    """The first two words of the question: "which movie", "who is"."""
    return " ".join(question.casefold().split()[:2])


VLKEB = Layout(
    name="VLKEB",
    parts=(("train.json", "VLKEB/train.json", "vlkeb/train.json"), ("eval.json", "VLKEB/eval.json", "vlkeb/eval.json")),
    pictures=("", "mmkb_images", "images"),
    category=opening,
    tidy=lambda text: text.replace("_", " "),
)


@STREAMS.register("vlkeb-yearly")
class VlkebYearly(EntryStream):
    """VLKEB's files. Raises `BadStream` where they cannot be used."""

    summary = "VLKEB: who or what a picture shows (needs --data-root; without pictures --missing-images text)"
    licence = "VLKEB: BSD-3-Clause; pictures: MMKB, as found on the web"
    size = "5,000 and 3,174 records (train, eval)"
    far_controls = False

    def read(self, config: StreamConfig) -> Data:
        return load(VLKEB, config)
