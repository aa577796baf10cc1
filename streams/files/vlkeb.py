"""`vlkeb-yearly`: VLKEB's questions about pictured entities, on a yearly schedule."""

from __future__ import annotations

from streams.files.mmedit import Layout, MMEditForm
from testbed.core.registry import STREAMS


def opening(question: str, target: str) -> str:
    """The first two words of the question: "which movie", "who is"."""
    return " ".join(question.casefold().split()[:2])


NAMES = {
    "edit_success_now": ("Reliability", "after this one edit, the answer to the edited question is the target"),
    "text_generality": ("Text Generality", "the answer to a rephrased question is the target"),
    "image_generality": ("Image Generality", "the answer about another picture of the entity is the target"),
    "locality_text": ("Text Locality", "the answer to a text question is the one before the edit"),
    "locality_far": ("Image Locality", "the answer about an unrelated picture is the one before the edit"),
    "portability": ("Portability", "the answer to a question one hop further follows from the target"),
}
"""Names and definitions of Huang et al., NeurIPS 2024, arXiv 2403.07350."""

VLKEB = Layout(
    name="VLKEB",
    parts=(("train.json", "VLKEB/train.json", "vlkeb/train.json"), ("eval.json", "VLKEB/eval.json", "vlkeb/eval.json")),
    pictures=("", "mmkb_images", "images"),
    category=opening,
    names=NAMES,
    tidy=lambda text: text.replace("_", " "),
)


@STREAMS.register("vlkeb-yearly")
class VlkebYearly(MMEditForm):
    """VLKEB's files. Raises `BadStream` where they cannot be used."""

    summary = "VLKEB: who or what a picture shows (needs --data-root; without pictures --missing-images text)"
    licence = "VLKEB: BSD-3-Clause; pictures: MMKB, as found on the web"
    size = "5,000 and 3,174 records (train, eval)"
    layout = VLKEB
