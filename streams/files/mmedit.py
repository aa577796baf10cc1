"""`mmedit-yearly` (E-VQA) and `mmedit-caption-yearly` (E-IC): the MMEdit files, or the simulated world in their form."""

from __future__ import annotations

from streams.files.files_or_world import FilesOrWorld
from streams.files.mmedit_files import Layout, MMEditForm
from testbed.core.registry import STREAMS

_LICENCE = "MMEdit (EasyEdit): MIT; questions, captions: VQAv2, COCO, OK-VQA, CC BY 4.0; photos: Flickr terms; simulated world: MIT"
_NUMBERS = frozenset(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"])


def answer_type(question: str, target: str) -> str:
    """VQAv2's three types of answer: yes/no, number, other."""
    bare = target.casefold().strip(" .")
    if bare in ("yes", "no"):
        return "yes/no"
    return "number" if bare in _NUMBERS or bare.replace(",", "").replace(".", "", 1).isdigit() else "other"


_SINGLE = "after this one edit, "
NAMES = {
    "edit_success_now": ("Reliability", _SINGLE + "the answer to the edited question about the edited picture is the target"),
    "edit_success": ("Reliability, at the end", "not in the paper: the same after the whole stream"),
    "text_generality": ("T-Generality", _SINGLE + "the answer to a rephrased question is the target"),
    "image_generality": ("M-Generality", _SINGLE + "the answer about a rephrased picture is the target"),
    "locality_text": ("T-Locality", "the answer to a text question is the one before the edit"),
    "locality_far": ("M-Locality", "the answer about an unrelated picture is the one before the edit"),
    "locality_text_top1": ("T-Locality of the public code", "share of positions of prompt and answer whose likeliest token is the same"),
    "locality_far_top10": ("M-Locality of the public code", "share of equal ids at equal ranks of the top 10, all positions"),
}
"""Names and definitions of Cheng et al., EMNLP 2023, section 4, and of EasyEdit's code."""

VQA = Layout(
    name="MMEdit E-VQA",
    parts=(("vqa/vqa_train.json", "vqa_train.json"), ("vqa/vqa_eval.json", "vqa_eval.json")),
    pictures=("", "images"),
    category=answer_type,
    beside=("_balancedit",),
    names=NAMES,
)
CAPTION = Layout(
    name="MMEdit E-IC",
    parts=(("caption/caption_train_edit.json", "caption_train_edit.json"), ("caption/caption_eval_edit.json", "caption_eval_edit.json")),
    pictures=("", "images"),
    category=lambda question, target: "caption",
    bare=False,
    names=NAMES,
)


class EVqaFiles(MMEditForm):
    """The official files of E-VQA."""

    name, summary, licence, layout = "mmedit", "MMEdit E-VQA files", _LICENCE, VQA


class CaptionFiles(MMEditForm):
    """The official files of E-IC."""

    name, summary, licence, layout = "mmedit", "MMEdit E-IC files", _LICENCE, CAPTION


@STREAMS.register("mmedit-yearly")
class MMEditYearly(FilesOrWorld):
    """E-VQA form: a picture, a question, an answer."""

    summary = "MMEdit E-VQA: answers about photos (files with --data-root, else the simulated world)"
    time_axis = "scheduled"
    licence = _LICENCE
    size = "6,346 and 2,093 records (train, eval); the world without end"
    form, files = "vqa", EVqaFiles


@STREAMS.register("mmedit-caption-yearly")
class MMEditCaptionYearly(FilesOrWorld):
    """E-IC form: a picture, a fixed instruction, a caption."""

    summary = "MMEdit E-IC: captions of photos (files with --data-root, else the simulated world)"
    time_axis = "scheduled"
    licence = _LICENCE
    size = "2,849 and 1,000 records (train, eval); the world without end"
    form, files = "caption", CaptionFiles
