"""The OKEDIT files: where they lie, what a usable record is, and which records are never edited."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from streams.base import BadStream, MissingImages, Skipped
from streams.files.pictures import FilePicture, coco_photos, list_folder, same_pixels
from streams.files.records import BadField, clean, distinct, id_of, optional_text, plain, read_table, reasons, text_of, texts_of, votes_of
from streams.transforms import share
from testbed.core.events import BadPicture, content_id

CONTROL_SHARE = 0.15
"""Share of records that no stream ever edits: half are asked as controls, half go to the train pool."""
_PREFIX, _SUFFIX = "mscoco_", "_annotations_train.json"
_EXPECTED = (
    "mscoco_*_annotations_train.json, OpenEnded_mscoco_*_questions_train.json, *2014/COCO_*.jpg, rephrased_images/, locality_images_dalle2/"
)


@dataclass(frozen=True, slots=True)
class Record:
    """One usable question about one photo. `pred` is what most annotators answered, `aliases` what two or more
    others did; `photo` is None only where it is absent and the policy asks without."""

    qid: int
    image_id: int
    category: str
    question: str
    pred: str
    aliases: tuple[str, ...]
    target: str
    rephrased: tuple[str, ...]
    rephrased_train: tuple[str, ...]
    locality_answer: str | None
    photo: FilePicture | None
    role: str = "edit"
    """"edit", or for records that no event touches: "probe" (asked as a control) or "train" (in the train pool)."""

    @property
    def held_out(self) -> tuple[str, ...]:
        """Paraphrases that probes ask."""
        return distinct(self.rephrased, [self.question])

    @property
    def train(self) -> tuple[str, ...]:
        """Paraphrases that editors may learn from: none equals one that probes ask."""
        return distinct(self.rephrased_train, [self.question, *self.rephrased])


@dataclass(frozen=True)
class OkeditData:
    """Usable records by question id, and what was left out. `split` is the part of the file names ("val2014")."""

    root: Path
    split: str
    records: tuple[Record, ...]
    skipped: tuple[Skipped, ...]
    total: int
    digest: str


def load(data_root: Path, missing: MissingImages) -> OkeditData:
    """Read a folder of the OKEDIT layout (or its annotation file). No picture is decoded.

    Raises `BadStream` for a wrong layout, an unreadable file, or when no record can be used.
    """
    annotations, questions, split = find_files(Path(data_root))
    root = annotations.parent
    top, rows, raw_a = read_table(annotations, "annotations")
    _, asked, raw_q = read_table(questions, "questions")
    reader = _Reader(root, missing, coco_photos(root, split), _categories(top))
    by_id = reader.index(asked, "questions", questions.name)
    records = [r for i, row in enumerate(rows) if (r := reader.record(i, row, by_id, annotations.name)) is not None]
    for qid in sorted(by_id.keys() - reader.ids):
        reader.skipped.append(Skipped(f"{questions.name} question {qid}", "no annotation has this question_id"))
    if not records:
        why = reasons(reader.skipped) or "the file is empty"
        raise BadStream(f"{root}: none of {len(rows)} records can be used ({why}). Expected {_EXPECTED}.")
    photos = [(r.photo.name, r.photo.size) for r in records if r.photo]
    digest = content_id(hashlib.sha256(raw_a).hexdigest(), hashlib.sha256(raw_q).hexdigest(), sorted(photos))
    ordered = assign_roles(sorted(records, key=lambda r: r.qid))
    return OkeditData(root, split, ordered, tuple(reader.skipped), len(rows), digest)


def find_files(root: Path) -> tuple[Path, Path, str]:
    """The annotation file, the question file and the split's name. Raises `BadStream` that says what was found."""
    if root.is_file() and root.name.startswith(_PREFIX) and root.name.endswith(_SUFFIX):
        found = [root]
    elif root.is_dir():
        found = _annotation_files(root)
    else:
        raise BadStream(f"data root {root} is not a folder. Give the folder that holds {_EXPECTED}.")
    if not found:
        raise BadStream(_wrong_layout(root))
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise BadStream(f"{root} holds {len(found)} OKEDIT splits: give the annotation file of one as data root: {names}.")
    split = found[0].name[len(_PREFIX) : -len(_SUFFIX)]
    questions = found[0].with_name(f"OpenEnded_{_PREFIX}{split}_questions_train.json")
    if not questions.is_file():
        raise BadStream(f"{questions} is absent: {found[0].name} needs the question file of the same split beside it.")
    return found[0], questions, split


def _annotation_files(root: Path) -> list[Path]:
    return [root / e.name for e in list_folder(root) if e.name.startswith(_PREFIX) and e.name.endswith(_SUFFIX) and e.is_file()]


def _wrong_layout(root: Path) -> str:
    below = [root / e.name for e in list_folder(root) if e.is_dir() and _annotation_files(root / e.name)]
    if len(below) == 1:
        return f"{root} is one level too high: the OKEDIT files lie in {below[0]}. Give that folder as data root."
    if below:
        return f"{root} is one level too high. Give one of these as data root: {', '.join(map(str, below))}."
    names = [e.name for e in list_folder(root)]
    listing = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"{root} has not the OKEDIT layout. Expected {_EXPECTED}; found {listing or 'nothing'}. Give the folder that holds them."


def _categories(top: Mapping[str, Any]) -> dict[str, str]:
    """OK-VQA's own table of question types, where the file carries it."""
    table = top.get("question_types")
    if not isinstance(table, dict):
        return {}
    names = {}
    for code in table:
        try:
            names[code] = text_of(table, code)
        except BadField:
            continue  # the code itself then names the category
    return names


class _Reader:
    """Turns rows into records; what cannot be used is written to `skipped`, never dropped in silence."""

    def __init__(self, root: Path, missing: MissingImages, photos: Mapping[int, str], categories: Mapping[str, str]) -> None:
        self.root, self.missing, self.photos, self.categories = root, missing, photos, categories
        self.skipped: list[Skipped] = []
        self.ids: set[int] = set()
        self._facts: dict[tuple[int | None, str], list[FilePicture | None]] = {}

    def index(self, rows: list[Any], field: str, file: str) -> dict[int, Mapping[str, Any]]:
        """Rows by question id; the first of a repeated id stays."""
        out: dict[int, Mapping[str, Any]] = {}
        for i, row in enumerate(rows):
            try:
                qid = id_of(_row(row), "question_id")
                if qid in out:
                    raise BadField("question_id stands twice")
                out[qid] = row
            except BadField as e:
                self.skipped.append(Skipped(f"{file} {field}[{i}]{_named(row)}", str(e)))
        return out

    def record(self, i: int, row: object, questions: Mapping[int, Mapping[str, Any]], file: str) -> Record | None:
        """The record of one annotation; None when it was skipped."""
        try:
            qid = id_of(_row(row), "question_id")
            if qid in self.ids:
                raise BadField("question_id stands twice")
            self.ids.add(qid)
            if qid not in questions:
                raise BadField("no question has this question_id")
            return self._build(qid, _row(row), questions[qid])
        except (BadField, BadPicture) as e:
            self.skipped.append(Skipped(f"{file} annotations[{i}]{_named(row)}", str(e)))
            return None

    def _build(self, qid: int, a: Mapping[str, Any], q: Mapping[str, Any]) -> Record:
        image_id = id_of(a, "image_id")
        if q.get("image_id") is not None and id_of(q, "image_id") != image_id:
            raise BadField("image_id differs between question and annotation")
        question, target = text_of(q, "question"), text_of(a, "counterfact_answer")
        pred, aliases = _answers(a, target)
        record = Record(
            qid=qid,
            image_id=image_id,
            category=self._category(a),
            question=question,
            pred=pred,
            aliases=aliases,
            target=target,
            rephrased=texts_of(q, "rephrased_questions"),
            rephrased_train=texts_of(q, "rephrased_questions_train"),
            locality_answer=optional_text(a, "locality_answer"),
            photo=self._photo(image_id),
        )
        self._once(record)
        return record

    def _category(self, a: Mapping[str, Any]) -> str:
        value = a.get("question_type")
        if value is None:
            return "other"
        name = str(value) if isinstance(value, int) and not isinstance(value, bool) else clean(value, "question_type")
        return self.categories.get(name) or (f"question type {name}" if name else "other")

    def _photo(self, image_id: int) -> FilePicture | None:
        name = self.photos.get(image_id)
        photo = FilePicture(self.root, name) if name else None
        if photo is not None and photo.path.is_file() and photo.size:
            return photo
        if self.missing == "text":
            return None
        why = "the photo's file is empty" if photo else f"no photo *2014/COCO_*_{'<image_id>'}.jpg"
        raise BadField(f"{why}, and OKEDIT has no captions: choose skip or text" if self.missing == "caption" else why)

    def _once(self, record: Record) -> None:
        """One question of one photo may have one answer only: a second record would edit the first one's fact.

        Copies under two names are one photo; files are read only where question and size are equal.
        """
        photo = record.photo
        earlier = self._facts.setdefault((photo.size if photo else None, plain(record.question)), [])
        if any(photo is None or other is None or same_pixels(photo, other) for other in earlier):
            raise BadField("the same question about the same photo stands in an earlier record")
        earlier.append(photo)


def _answers(a: Mapping[str, Any], target: str) -> tuple[str, tuple[str, ...]]:
    """What most annotators said (the first mentioned of equals), and the other answers given at least twice."""
    votes = votes_of(a, "answers")
    pred = votes.most_common(1)[0][0]
    if plain(pred) == plain(target):
        raise BadField("counterfact_answer equals the answer before the edit")
    others = [v for v, n in votes.items() if n >= 2 and v != pred]
    return pred, distinct(others, [pred, target]) if others else ()


def assign_roles(records: list[Record]) -> tuple[Record, ...]:
    """Set aside the records that are never edited, by a hash of their ids: the same ones under every seed.

    Of a photo with several questions one is set aside and asked (locality: same photo, other question), and
    the others are edited.
    """
    by_photo: dict[int, list[Record]] = {}
    for r in records:
        if r.photo:
            by_photo.setdefault(r.image_id, []).append(r)
    roles = {r.qid: _role(r.qid) for r in records}
    for group in by_photo.values():
        if len(group) > 1:
            chosen = min(group, key=lambda r: share("sibling", r.qid))
            roles |= {r.qid: "probe" if r is chosen else "edit" for r in group}
    return tuple(replace(r, role=roles[r.qid]) for r in records)


def _role(qid: int) -> str:
    u = share("okedit control", qid)
    return "edit" if u >= CONTROL_SHARE else ("probe" if u < CONTROL_SHARE / 2 else "train")


def _row(row: object) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise BadField("expected an object")
    return row


def _named(row: object) -> str:
    qid = row.get("question_id") if isinstance(row, Mapping) else None
    return f" question {qid}" if isinstance(qid, (int, str)) and len(str(qid)) <= 20 else ""
