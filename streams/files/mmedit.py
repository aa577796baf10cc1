"""`mmedit-yearly` (E-VQA) and `mmedit-caption-yearly` (E-IC): the MMEdit files, or the simulated world in their form.

VLKEB's files have the same fields, so its stream stands on `MMEditForm` too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from streams.base import StreamConfig
from streams.files.entry import EntryData, EntryQuestion, FactEntry
from streams.files.entry_stream import EntryStream
from streams.files.fields import SOURCES, RecordReader, as_object, must_differ, questions_at
from streams.files.files_or_world import or_world
from streams.files.pictures import FilePicture, list_folder, stays_inside
from streams.files.records import BadField, distinct, normalize, optional_text, text_at, texts_at
from streams.files.tables import find_parts, read_rows
from testbed.core.events import content_id

PICTURES = ("image", "image_rephrase", "m_loc")
"""The fields that name pictures."""
_PREFIX = "nq question: "


class MMEditForm(EntryStream):
    """Files in the fields of MMEdit on a yearly schedule. Raises `BadStream` where they cannot be used."""

    source: ClassVar[str]
    """Its name in `SOURCES`."""
    bare: ClassVar[bool] = True
    """Whether a prompt can be asked without its picture."""
    far_controls = False
    """Only the data set's own unrelated picture is asked as `locality_far`."""

    @staticmethod
    def category(question: str, target: str) -> str:
        """The category of a record."""
        raise NotImplementedError

    @staticmethod
    def tidy(previous: str) -> str:
        """The answer before the edit as it is asked."""
        return previous

    def read(self, config: StreamConfig) -> EntryData:
        """Read the parts that lie under the data root. No picture is decoded."""
        files = find_parts(config.data_root, SOURCES[self.source]["parts"], self.source)
        above = [files[0].parent, *files[0].parent.parents[:2]]
        index = _PictureIndex([base / folder for base in above for folder in ("", "mmkb_images", "images")])
        reader = _MMEditReader(form=type(self), policy=config.absent_images, index=index)
        entries: list[FactEntry] = []
        for path in files:
            rows = reader.rows(path)
            reader.more_train = reader.train_paraphrases(path)
            reader.total += len(rows)
            entries += reader.usable(rows, reader.entry, path.name)
        pictures = (p for e in entries for p in (e.image, *(q.image for q in e.questions)))
        used = sorted({(p.name, p.size) for p in pictures if isinstance(p, FilePicture)})
        title = f"{self.source} files {' and '.join(p.name for p in files)}"
        digest = content_id(reader.digests, used, config.absent_images)
        note = f"; pictures missing: {config.absent_images}"
        data = reader.entry_data(entries, title, str(files[0].parent), digest, note)
        return replace(data, missing={f: reader.missing[f] for f in PICTURES})

    def counts(self) -> dict[str, Any]:
        return super().counts() | {"published_names": {ours: list(theirs) for ours, theirs in SOURCES[self.source]["names"].items()}}


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

    form: type[MMEditForm]
    policy: Literal["skip", "text", "caption"]
    index: _PictureIndex
    missing: Counter[str] = field(default_factory=Counter)
    more_train: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)

    def train_paraphrases(self, path: Path) -> dict[tuple[str, str], tuple[str, ...]]:
        """Train paraphrases of the same records from the file beside, by picture and question."""

        def paraphrases(row: Any, _: str) -> tuple[tuple[str, str], tuple[str, ...]]:
            key = text_at(as_object(row), "image"), normalize(text_at(row, "src"))
            return key, texts_at(row, "rephrased_questions_train")

        other = path.with_name(f"{path.stem}_balancedit.json")
        return dict(self.usable(read_rows(other, self.skipped)[0], paraphrases, other.name)) if other.is_file() else {}

    def entry(self, row: Any, name: str) -> FactEntry:
        """One row as an entry. Raises `BadField` or `BadPicture` where it cannot be used."""
        src, target = text_at(as_object(row), "src"), text_at(row, "alt")
        previous = optional_text(row, "pred")
        previous = self.form.tidy(previous) if previous else None
        photo, rephrased, local = (self._picture(row, f) for f in PICTURES)
        must_differ(target, previous, ("alt", "pred"))
        train = (*texts_at(row, "rephrased_questions_train"), *self.more_train.get((text_at(row, "image"), normalize(src)), ()))
        stand_in = "" if photo else self._stand_in(row, src, previous)
        held_out = distinct([_unquoted(t) for t in texts_at(row, "rephrase")], [src])
        entry = FactEntry(
            source=name,
            prompt=stand_in + src,
            target=target,
            previous=previous,
            subject=f"picture {row['image']}, {name}",
            relation=self.form.category(src, target),
            image=photo,
            held_out=tuple(stand_in + p for p in held_out),
            train=tuple(stand_in + p for p in distinct(train, [src, *held_out])),
            questions=tuple(self._questions(row, stand_in + src, target, (photo, rephrased, local))),
        )
        where = " about the same picture" if photo else ", asked without its picture,"
        self.take(entry.key, f"the same question{where}")
        return entry

    def _picture(self, row: Mapping[str, Any], name: str) -> FilePicture | None:
        """The picture that a field names; None, and counted as missing, where there is no file."""
        value = text_at(row, name) if name == "image" else optional_text(row, name)
        picture = self.index.find(value) if value else None
        if picture is None:
            self.missing[name] += 1
        return picture

    def _stand_in(self, row: Mapping[str, Any], src: str, previous: str | None) -> str:
        """The text before a prompt whose picture is absent. Raises `BadField` where the policy allows no such prompt."""
        if self.policy == "text" and self.form.bare:
            return ""
        if self.policy == "text":
            raise BadField("no file for image, and the instruction alone says nothing: choose --missing-images skip or caption")
        if self.policy == "caption":
            caption = optional_text(row, "caption") or (None if self.form.bare else previous)
            if caption:
                return f"Picture: {caption.rstrip('. ')}. "
            raise BadField("no file for image, and the record has no caption: choose --missing-images skip or text")
        raise BadField("no file for image")

    def _questions(self, row: Mapping[str, Any], prompt: str, target: str, pictures: tuple[FilePicture | None, ...]) -> list[EntryQuestion]:
        """The questions that a record brings: with a new picture, about unrelated text and an unrelated picture, one hop further."""
        photo, rephrased, local = pictures
        out = []
        if photo is not None and rephrased is not None:
            out.append(EntryQuestion("image_generality", prompt, target, rephrased))
        if loc := (optional_text(row, "loc") or "").removeprefix(_PREFIX).strip():
            out.append(EntryQuestion("locality_text", loc, optional_text(row, "loc_ans")))
        if local is not None and (far := optional_text(row, "m_loc_q")):
            out.append(EntryQuestion("locality_far", far, optional_text(row, "m_loc_a"), local))
        hops = questions_at(row, {"portability": "port_new"}, "portability", self.notes)
        if photo is not None:
            out += [replace(q, image=photo) for q in hops]
        elif hops:
            self.notes["port_new: a question one hop further needs the record's picture, which is absent"] += len(hops)
        return out


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


@or_world("mmedit-yearly", form="vqa")
class EVqaFiles(MMEditForm):
    """E-VQA form: a picture, a question, an answer."""

    summary = "MMEdit E-VQA: answers about photos (files with --data-root, else the simulated world)"
    licence = _LICENCE
    size = "6,346 and 2,093 records (train, eval); the world without end"
    source = "MMEdit E-VQA"
    category = staticmethod(answer_type)


@or_world("mmedit-caption-yearly", form="caption")
class CaptionFiles(MMEditForm):
    """E-IC form: a picture, a fixed instruction, a caption."""

    summary = "MMEdit E-IC: captions of photos (files with --data-root, else the simulated world)"
    licence = _LICENCE
    size = "2,849 and 1,000 records (train, eval); the world without end"
    source = "MMEdit E-IC"
    bare = False

    @staticmethod
    def category(question: str, target: str) -> str:
        return "caption"
