"""`mmedit-yearly` (E-VQA) and `mmedit-caption-yearly` (E-IC): the MMEdit files, or the simulated world in their form."""

from __future__ import annotations

from streams._either import Either
from streams._entries import EntryStream
from streams._entry import Data
from streams._mmedit import Layout, load
from streams.base import Stream, StreamConfig
from testbed.registry import STREAMS

_LICENCE = "MMEdit (EasyEdit): MIT; questions, captions: VQAv2, COCO, OK-VQA, CC BY 4.0; photos: Flickr terms; simulated world: MIT"
_NUMBERS = frozenset(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"])


def answer_type(question: str, target: str) -> str:
    """VQAv2's three types of answer: yes/no, number, other."""
    bare = target.casefold().strip(" .")
    if bare in ("yes", "no"):
        return "yes/no"
    return "number" if bare in _NUMBERS or bare.replace(",", "").replace(".", "", 1).isdigit() else "other"


VQA = Layout(
    name="MMEdit E-VQA",
    parts=(("vqa/vqa_train.json", "vqa_train.json"), ("vqa/vqa_eval.json", "vqa_eval.json")),
    pictures=("", "images"),
    category=answer_type,
    beside=("_balancedit",),
)
CAPTION = Layout(
    name="MMEdit E-IC",
    parts=(("caption/caption_train_edit.json", "caption_train_edit.json"), ("caption/caption_eval_edit.json", "caption_eval_edit.json")),
    pictures=("", "images"),
    category=lambda question, target: "caption",
    bare=False,
)


class MMEditFiles(EntryStream):
    """The official files of one of the two sets. Raises `BadStream` where they cannot be used."""

    name = "mmedit"
    summary = "MMEdit files"
    licence = _LICENCE
    far_controls = False
    """`locality_far` is MMEdit's own M-Locality and nothing else."""

    def __init__(self, config: StreamConfig, layout: Layout) -> None:
        self._layout = layout
        super().__init__(config)

    def read(self, config: StreamConfig) -> Data:
        return load(self._layout, config)


@STREAMS.register("mmedit-yearly")
class MMEditYearly(Either):
    """E-VQA form: a picture, a question, an answer."""

    summary = "MMEdit E-VQA: answers about photos (files with --data-root, else the simulated world)"
    time_axis = "scheduled"
    licence = _LICENCE
    size = "6,346 and 2,093 records (train, eval); the world without end"
    form = "vqa"

    def files(self, config: StreamConfig) -> Stream:
        return MMEditFiles(config, VQA)


@STREAMS.register("mmedit-caption-yearly")
class MMEditCaptionYearly(Either):
    """E-IC form: a picture, a fixed instruction, a caption."""

    summary = "MMEdit E-IC: captions of photos (files with --data-root, else the simulated world)"
    time_axis = "scheduled"
    licence = _LICENCE
    size = "2,849 and 1,000 records (train, eval); the world without end"
    form = "caption"

    def files(self, config: StreamConfig) -> Stream:
        return MMEditFiles(config, CAPTION)
