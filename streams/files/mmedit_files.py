"""The MMEdit files, E-VQA and E-IC, and VLKEB's, which have the same fields: where they lie, what a record gives."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from streams.base import MissingImages, Skipped, StreamConfig
from streams.files.entry import Data, EntryQuestion, FactEntry, with_roles
from streams.files.entry_stream import EntryStream
from streams.files.fields import Once, answers, find, must_differ, nested, none_left, read_rows
from streams.files.pictures import FilePicture, list_folder, stays_inside
from streams.files.records import BadField, clean, distinct, kind_of, optional_text, plain, reasons, text_of, texts_of
from testbed.core.events import BadPicture, content_id

PICTURES = ("image", "image_rephrase", "m_loc")
"""The fields that name pictures."""
_PREFIX = "nq question: "


@dataclass(frozen=True)
class Layout:
    """What one release looks like.

    parts: for each part of the set the paths where its file may lie; every part that is there is read.
    pictures: where the pictures' own paths may start, under the data root or a folder above it.
    beside: files of a part that carry train paraphrases for the same records.
    bare: whether the prompt means something without its picture.
    names: what the paper calls our metrics, and how it defines them.
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
    """`locality_far` is the set's own unrelated picture and nothing else."""

    def read(self, config: StreamConfig) -> Data:
        return load(self.layout, config)

    def counts(self) -> dict[str, Any]:
        return super().counts() | {"published_names": {ours: list(theirs) for ours, theirs in self.layout.names.items()}}


def load(layout: Layout, config: StreamConfig) -> Data:
    """Read the parts that lie under the data root. No picture is decoded. Raises `BadStream`."""
    files = _files(layout, config.data_root)
    reader = _Reader(layout, config.missing_images, _Index(_picture_roots(layout, files[0])))
    digests, total = [], 0
    for path in files:
        rows, raw = read_rows(path, reader.skipped)
        reader.more = _train_paraphrases(layout, path, reader.skipped)
        digests.append((path.name, hashlib.sha256(raw).hexdigest()))
        total += len(rows)
        reader.read(path.name, rows)
    none_left(reader.entries, total, str(files[0].parent), reasons(reader.skipped))
    used = sorted({(p.name, p.size) for e in reader.entries for p in (e.image, *(a.image for a in e.asks)) if isinstance(p, FilePicture)})
    names = " and ".join(p.name for p in files)
    origin = f"{layout.name} files {names} ({len(reader.entries):,} usable of {total:,} records; pictures missing: {config.missing_images})"
    missing = {f: reader.missing[f] for f in PICTURES}
    digest = content_id(digests, used, config.missing_images)
    return Data(origin, with_roles(reader.entries), tuple(reader.skipped), digest, missing)


def _files(layout: Layout, root: Path | None) -> list[Path]:
    if root is not None and Path(root).is_dir():
        found = [next((Path(root) / p for p in part if (Path(root) / p).is_file()), None) for part in layout.parts]
        if any(found):
            return [p for p in found if p is not None]
    return find(root, [p for part in layout.parts for p in part], layout.name)[:1]


def _picture_roots(layout: Layout, file: Path) -> list[Path]:
    above = [file.parent, *file.parent.parents[:2]]
    return [base / p for base in above for p in layout.pictures]


def _train_paraphrases(layout: Layout, path: Path, skipped: list[Skipped]) -> dict[tuple[str, str], tuple[str, ...]]:
    """Train paraphrases of the same records from the file beside, by picture and question."""
    out: dict[tuple[str, str], tuple[str, ...]] = {}
    for name in layout.beside:
        other = path.with_name(f"{path.stem}{name}.json")
        if not other.is_file():
            continue
        rows, _ = read_rows(other, skipped)
        for i, row in enumerate(rows):
            try:
                if not isinstance(row, Mapping):
                    raise BadField(f"expected an object, found {kind_of(row)}")
                out[text_of(row, "image"), plain(text_of(row, "src"))] = texts_of(row, "rephrased_questions_train")
            except BadField as e:
                skipped.append(Skipped(f"{other.name} record {i}", str(e)))
    return out


class _Index:
    """Which picture files exist, by listing each folder once."""

    def __init__(self, roots: list[Path]) -> None:
        self._roots = roots
        self._known: dict[tuple[Path, str], set[str]] = {}

    @cached_property
    def roots(self) -> list[Path]:
        return [r for r in self._roots if r.is_dir()]

    def find(self, name: str) -> FilePicture | None:
        """The picture of that name under the first root that has it. Raises `BadField` for a name that leaves the root."""
        if not stays_inside(name):
            raise BadField("the picture's name leaves the folder: expected a relative path without '..'")
        folder, _, file = name.rpartition("/")
        for root in self.roots:
            if file in self._listing(root, folder):
                return FilePicture(root, name)
        return None

    def _listing(self, root: Path, folder: str) -> set[str]:
        known = self._known.get((root, folder))
        if known is None:
            known = {e.name for e in list_folder(root / folder) if _is_full(e)}
            self._known[root, folder] = known
        return known


def _is_full(entry: os.DirEntry[str]) -> bool:
    return entry.is_file() and entry.stat().st_size > 0


@dataclass
class _Reader:
    """Turns rows into entries; what cannot be used is written to `skipped`, what lacks a picture is counted."""

    layout: Layout
    policy: MissingImages
    index: _Index
    entries: list[FactEntry] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    missing: Counter[str] = field(default_factory=Counter)
    more: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)
    once: Once = field(default_factory=Once)

    def read(self, file: str, rows: list[Any]) -> None:
        for i, row in enumerate(rows):
            where = f"{file} record {i}"
            try:
                if not isinstance(row, Mapping):
                    raise BadField(f"expected an object, found {kind_of(row)}")
                self.entries.append(self._entry(where, row))
            except (BadField, BadPicture) as e:
                self.skipped.append(Skipped(where, str(e)))

    def _entry(self, name: str, row: Mapping[str, Any]) -> FactEntry:
        src, target = text_of(row, "src"), text_of(row, "alt")
        previous = self._tidy(optional_text(row, "pred"))
        photo, rephrased, local = (self._picture(row, f) for f in PICTURES)
        must_differ(target, previous, ("alt", "pred"))
        train = (*texts_of(row, "rephrased_questions_train"), *self.more.get((clean(row.get("image"), "image"), plain(src)), ()))
        stand_in = "" if photo else self._stand_in(row, src, previous)
        held_out = distinct([_unquoted(t) for t in answers(row, "rephrase")], [src])
        entry = FactEntry(
            name=name,
            prompt=stand_in + src,
            target=target,
            previous=previous,
            subject=f"picture {row['image']}, {name}",
            category=self.layout.category(src, target),
            image=photo,
            held_out=tuple(stand_in + p for p in held_out),
            train=tuple(stand_in + p for p in distinct(train, [src, *held_out])),
            asks=tuple(_asks(row, stand_in + src, target, (photo, rephrased, local))),
        )
        self.once.take(
            entry.place, "the same question about the same picture" if photo else "the same question, asked without its picture,"
        )
        return entry

    def _tidy(self, text: str | None) -> str | None:
        return self.layout.tidy(text) if text else None

    def _picture(self, row: Mapping[str, Any], name: str) -> FilePicture | None:
        """The picture a field names; None, and counted, where there is no file."""
        value = text_of(row, name) if name == "image" else optional_text(row, name)
        picture = self.index.find(value) if value else None
        if picture is None:
            self.missing[name] += 1
        return picture

    def _stand_in(self, row: Mapping[str, Any], src: str, previous: str | None) -> str:
        """What goes before a prompt whose picture is absent. Raises `BadField` where the policy has no way to ask."""
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


def _asks(row: Mapping[str, Any], prompt: str, target: str, pictures: tuple[FilePicture | None, ...]) -> list[EntryQuestion]:
    """The questions a record brings: new picture, unrelated text, unrelated picture, one hop further."""
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
    return list(nested({"port": rows}, "port", "portability"))


def _unquoted(text: str) -> str:
    bare = text.strip()
    return bare[1:-1].strip() or bare if len(bare) > 1 and bare[0] == bare[-1] == '"' else bare
