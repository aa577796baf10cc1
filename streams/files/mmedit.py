"""`mmedit-yearly` (E-VQA) and `mmedit-caption-yearly` (E-IC): the MMEdit files, or the simulated world in their form.

VLKEB's files have the same fields, so its stream stands on `MMEditForm` too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from streams.base import MissingImages, StreamConfig
from streams.files.entry import EntryData, EntryQuestion, FactEntry
from streams.files.entry_stream import EntryStream
from streams.files.fields import RecordReader, as_object, find_parts, must_differ, nested_questions, read_rows, texts_at
from streams.files.files_or_world import FilesOrWorld
from streams.files.pictures import FilePicture, list_folder, stays_inside
from streams.files.records import BadField, clean, distinct, normalize, optional_text, text_of, texts_of
from testbed.core.events import content_id
from testbed.core.registry import STREAMS

PICTURES = ("image", "image_rephrase", "m_loc")
"""The fields that name pictures."""
_PREFIX = "nq question: "


@dataclass(frozen=True)
class Layout:
    """The layout of one data set's release.

    parts: for each part of the set the paths where its file may lie; every part that is found is read.
    pictures: folders that the paths of pictures may start from, under the data root or a folder above it.
    category: gives the category of a record from its question and target.
    beside: suffixes of the names of files that hold train paraphrases for the records of a part.
    bare: whether the prompt can be asked without its picture.
    names: for each of our metrics the paper's name and definition.
    tidy: rewrites the answer before the edit.
    """

    name: str
    parts: tuple[tuple[str, ...], ...]
    pictures: tuple[str, ...]
    category: Callable[[str, str], str]
    beside: tuple[str, ...] = ()
    bare: bool = True
    names: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    tidy: Callable[[str], str] = str


class MMEditForm(EntryStream):
    """Files of one layout on a yearly schedule. Raises `BadStream` where they cannot be used."""

    layout: Layout
    far_controls = False
    """Only the data set's own unrelated picture is asked as `locality_far`."""

    def read(self, config: StreamConfig) -> EntryData:
        """Read the parts that lie under the data root. No picture is decoded."""
        layout, files = self.layout, find_parts(config.data_root, self.layout.parts, self.layout.name)
        above = [files[0].parent, *files[0].parent.parents[:2]]
        index = _PictureIndex([base / p for base in above for p in layout.pictures])
        reader = _MMEditReader(layout=layout, policy=config.missing_images, index=index)
        entries: list[FactEntry] = []
        for path in files:
            rows = reader.rows(path)
            reader.more_train = reader.train_paraphrases(path)
            reader.total += len(rows)
            entries += reader.usable(rows, reader.entry, path.name)
        pictures = (p for e in entries for p in (e.image, *(q.image for q in e.questions)))
        used = sorted({(p.name, p.size) for p in pictures if isinstance(p, FilePicture)})
        title = f"{layout.name} files {' and '.join(p.name for p in files)}"
        digest = content_id(reader.digests, used, config.missing_images)
        note = f"; pictures missing: {config.missing_images}"
        data = reader.entry_data(entries, title, str(files[0].parent), digest, note)
        return replace(data, missing={f: reader.missing[f] for f in PICTURES})

    def counts(self) -> dict[str, Any]:
        return super().counts() | {"published_names": {ours: list(theirs) for ours, theirs in self.layout.names.items()}}


class _PictureIndex:
    """Which picture files exist under some folders, by listing each folder below them once."""

    def __init__(self, roots: list[Path]) -> None:
        self.roots = [r for r in roots if r.is_dir()]
        self._names = cache(lambda root, folder: {e.name for e in list_folder(root / folder) if e.is_file() and e.stat().st_size})

    def find(self, name: str) -> FilePicture | None:
        """The picture of that name under the first root that has it. Raises `BadField` for a name that leaves the root."""
        if not stays_inside(name):
            raise BadField("the picture's name leaves the folder: expected a relative path without '..'")
        folder, _, file = name.rpartition("/")
        return next((FilePicture(root, name) for root in self.roots if file in self._names(root, folder)), None)


@dataclass(kw_only=True)
class _MMEditReader(RecordReader):
    """Turns rows into entries; what lacks a picture is counted."""

    layout: Layout
    policy: MissingImages
    index: _PictureIndex
    missing: Counter[str] = field(default_factory=Counter)
    more_train: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)

    def train_paraphrases(self, path: Path) -> dict[tuple[str, str], tuple[str, ...]]:
        """Train paraphrases of the same records from the file beside, by picture and question."""

        def paraphrases(row: Any, _: str) -> tuple[tuple[str, str], tuple[str, ...]]:
            key = text_of(as_object(row), "image"), normalize(text_of(row, "src"))
            return key, texts_of(row, "rephrased_questions_train")

        out: dict[tuple[str, str], tuple[str, ...]] = {}
        for other in (path.with_name(f"{path.stem}{name}.json") for name in self.layout.beside):
            if other.is_file():
                out.update(self.usable(read_rows(other, self.skipped)[0], paraphrases, other.name))
        return out

    def entry(self, row: Any, name: str) -> FactEntry:
        """One row as an entry. Raises `BadField` or `BadPicture` where it cannot be used."""
        src, target = text_of(as_object(row), "src"), text_of(row, "alt")
        previous = optional_text(row, "pred")
        previous = self.layout.tidy(previous) if previous else None
        photo, rephrased, local = (self._picture(row, f) for f in PICTURES)
        must_differ(target, previous, ("alt", "pred"))
        train = (*texts_of(row, "rephrased_questions_train"), *self.more_train.get((clean(row.get("image"), "image"), normalize(src)), ()))
        stand_in = "" if photo else self._stand_in(row, src, previous)
        held_out = distinct([_unquoted(t) for t in texts_at(row, "rephrase")], [src])
        entry = FactEntry(
            source=name,
            prompt=stand_in + src,
            target=target,
            previous=previous,
            subject=f"picture {row['image']}, {name}",
            relation=self.layout.category(src, target),
            image=photo,
            held_out=tuple(stand_in + p for p in held_out),
            train=tuple(stand_in + p for p in distinct(train, [src, *held_out])),
            questions=tuple(_questions(row, stand_in + src, target, (photo, rephrased, local))),
        )
        where = " about the same picture" if photo else ", asked without its picture,"
        self.take(entry.key, f"the same question{where}")
        return entry

    def _picture(self, row: Mapping[str, Any], name: str) -> FilePicture | None:
        """The picture that a field names; None, and counted as missing, where there is no file."""
        value = text_of(row, name) if name == "image" else optional_text(row, name)
        picture = self.index.find(value) if value else None
        if picture is None:
            self.missing[name] += 1
        return picture

    def _stand_in(self, row: Mapping[str, Any], src: str, previous: str | None) -> str:
        """The text before a prompt whose picture is absent. Raises `BadField` where the policy allows no such prompt."""
        if self.policy == "text" and self.layout.bare:
            return ""
        if self.policy == "text":
            raise BadField("no file for image, and the instruction alone says nothing: choose --missing-images skip or caption")
        if self.policy == "caption":
            caption = optional_text(row, "caption") or (None if self.layout.bare else previous)
            if caption:
                return f"Picture: {caption.rstrip('. ')}. "
            raise BadField("no file for image, and the record has no caption: choose --missing-images skip or text")
        raise BadField("no file for image")


def _questions(row: Mapping[str, Any], prompt: str, target: str, pictures: tuple[FilePicture | None, ...]) -> list[EntryQuestion]:
    """The questions that a record brings: with a new picture, about unrelated text and an unrelated picture, one hop further."""
    photo, rephrased, local = pictures
    out = []
    if photo is not None and rephrased is not None:
        out.append(EntryQuestion("image_generality", prompt, target, rephrased))
    loc, loc_answer = optional_text(row, "loc"), optional_text(row, "loc_ans")
    if loc and loc.removeprefix(_PREFIX).strip():
        out.append(EntryQuestion("locality_text", loc.removeprefix(_PREFIX).strip(), loc_answer))
    far, far_answer = optional_text(row, "m_loc_q"), optional_text(row, "m_loc_a")
    if local is not None and far:
        out.append(EntryQuestion("locality_far", far, far_answer, local))
    if photo is not None:
        out += [EntryQuestion(a.split, a.prompt, a.answer, photo, a.aliases) for a in _one_hop(row)]
    return out


def _one_hop(row: Mapping[str, Any]) -> list[EntryQuestion]:
    """`port_new: [{"Q&A": {"Question": ..., "Answer": ...}}]` of VLKEB's evaluation files."""
    hops = row.get("port_new")
    if not isinstance(hops, list):
        return []
    pairs = [h.get("Q&A") for h in hops if isinstance(h, Mapping)]
    rows = [{"prompt": p.get("Question"), "ground_truth": p.get("Answer")} for p in pairs if isinstance(p, Mapping)]
    return list(nested_questions({"port": rows}, "port", "portability"))


def _unquoted(text: str) -> str:
    bare = text.strip()
    return bare[1:-1].strip() or bare if len(bare) > 1 and bare[0] == bare[-1] == '"' else bare


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
