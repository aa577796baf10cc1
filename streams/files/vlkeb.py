"""`vlkeb-yearly`: VLKEB's questions about pictured entities, on a yearly schedule."""

from __future__ import annotations

from streams.files.mmedit import MMEditForm
from testbed.core.registry import STREAMS


@STREAMS.register("vlkeb-yearly")
class VlkebYearly(MMEditForm):
    """VLKEB's files. Raises `BadStream` where they cannot be used."""

    summary = "VLKEB: who or what a picture shows (needs --data-root; without pictures --missing-images text)"
    licence = "VLKEB: BSD-3-Clause; pictures: MMKB, as found on the web"
    size = "5,000 and 3,174 records (train, eval)"
    source = "VLKEB"

    @staticmethod
    def category(question: str, target: str) -> str:
        """The first two words of the question: "which movie", "who is"."""
        return " ".join(question.casefold().split()[:2])

    @staticmethod
    def tidy(previous: str) -> str:
        return previous.replace("_", " ")
