"""The OKEDIT files: where they lie, and what a usable record is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from streams.base import BadStream, MissingImages, Skipped
from streams.files.entry import EntryData, FactEntry, with_roles
from streams.files.fields import listing, require_entries, usable
from streams.files.pictures import FilePicture, coco_photos, list_folder, same_pixels
from streams.files.records import BadField, clean, distinct, id_of, optional_text, plain, read_table, text_of, texts_of, votes_of
from testbed.core.events import content_id

_PREFIX, _SUFFIX = "mscoco_", "_annotations_train.json"
_EXPECTED = (
    "mscoco_*_annotations_train.json, OpenEnded_mscoco_*_questions_train.json, *2014/COCO_*.jpg, rephrased_images/, locality_images_dalle2/"
)


class Details(NamedTuple):
    """What OKEDIT says about a record besides its `FactEntry`."""

    question_id: int
    image_id: int
    locality_answer: str | None


@dataclass(frozen=True)
class OkeditFolder:
    """The usable records by rising question id, their details by name, and the number of records, usable or not."""

    data: EntryData
    details: Mapping[str, Details]
    total: int


def load(data_root: Path, missing: MissingImages) -> OkeditFolder:
    """Read a folder of the OKEDIT layout (or its annotation file). No picture is decoded.

    Raises `BadStream` for a wrong layout, an unreadable file, or when no record can be used.
    """
    annotations, questions, split = find_files(Path(data_root))
    root = annotations.parent
    top, rows, annotations_digest = read_table(annotations, "annotations")
    _, asked, questions_digest = read_table(questions, "questions")
    reader = _OkeditReader(root, split, missing, coco_photos(root, split), _categories(top))
    reader.index(asked, questions.name)
    entries = list(usable(rows, reader.entry, lambda i, row: f"{annotations.name} annotations[{i}]{_named(row)}", reader.skipped))
    for question_id in sorted(reader.questions.keys() - reader.ids):
        reader.skipped.append(Skipped(f"{questions.name} question {question_id}", "no annotation has this question_id"))
    require_entries(entries, len(rows), str(root), reader.skipped, f" Expected {_EXPECTED}.")
    photos = sorted((e.image.name, e.image.size) for e in entries if isinstance(e.image, FilePicture))
    digest = content_id(annotations_digest, questions_digest, photos)
    entries.sort(key=lambda e: reader.details[e.source].question_id)
    with_role = with_roles(entries, "okedit control", lambda e: reader.details[e.source].question_id)
    return OkeditFolder(EntryData(f"files of OKEDIT form, {split}", with_role, tuple(reader.skipped), digest), reader.details, len(rows))


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
    return f"{root} has not the OKEDIT layout. Expected {_EXPECTED}; found {listing(root)}. Give the folder that holds them."


def _categories(top: Mapping[str, Any]) -> dict[str, str]:
    """OK-VQA's own table of question types, where the file carries it."""
    table = top.get("question_types")
    if not isinstance(table, dict):
        return {}
    named = usable(table, lambda code, _: (code, text_of(table, code)), "question type", [])  # else the code names the category
    return dict(named)


@dataclass
class _OkeditReader:
    """Turns rows into entries and keeps their details; what cannot be used is written to `skipped`, never dropped in silence."""

    root: Path
    split: str
    missing: MissingImages
    photos: Mapping[int, str]
    categories: Mapping[str, str]
    questions: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    details: dict[str, Details] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    ids: set[int] = field(default_factory=set)
    _by_question: dict[tuple[int | None, str], list[FilePicture | None]] = field(default_factory=dict)

    def index(self, rows: list[Any], file: str) -> None:
        """Read the questions by their ids; the first of a repeated id stays."""
        ids: set[int] = set()
        found = usable(rows, lambda row, _: (_new_id(row, ids), row), lambda i, row: f"{file} questions[{i}]{_named(row)}", self.skipped)
        self.questions.update(found)

    def entry(self, row: Any, _: str) -> FactEntry:
        """The record of one annotation. Raises `BadField` or `BadPicture` where it cannot be used."""
        question_id = _new_id(row, self.ids)
        if question_id not in self.questions:
            raise BadField("no question has this question_id")
        q, image_id = self.questions[question_id], id_of(row, "image_id")
        if q.get("image_id") is not None and id_of(q, "image_id") != image_id:
            raise BadField("image_id differs between question and annotation")
        question, target = text_of(q, "question"), text_of(row, "counterfact_answer")
        previous, aliases = _answers(row, target)
        category = self._category(row)
        rephrased, train = texts_of(q, "rephrased_questions"), texts_of(q, "rephrased_questions_train")
        details = Details(question_id, image_id, optional_text(row, "locality_answer"))
        photo = self._photo(image_id)
        self._refuse_repeated(photo, question)
        source = f"okedit {self.split} question {question_id}"
        self.details[source] = details
        return FactEntry(
            source=source,
            prompt=question,
            target=target,
            previous=previous,
            subject=f"image {image_id}, question {question_id}",
            relation=category,
            image=photo,
            aliases=aliases,
            held_out=distinct(rephrased, [question]),
            train=distinct(train, [question, *rephrased]),
        )

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

    def _refuse_repeated(self, photo: FilePicture | None, question: str) -> None:
        """Raise `BadField` for a second record of one question about one photo: it would edit the first one's fact.

        Copies under two names are one photo; files are read only where question and size are equal.
        """
        earlier = self._by_question.setdefault((photo.size if photo else None, plain(question)), [])
        if any(photo is None or other is None or same_pixels(photo, other) for other in earlier):
            raise BadField("the same question about the same photo stands in an earlier record")
        earlier.append(photo)


def _new_id(row: object, taken: set[int]) -> int:
    """The row's question id, which is then taken. Raises `BadField` where it is absent, no number, or taken before."""
    if not isinstance(row, Mapping):
        raise BadField("expected an object")
    question_id = id_of(row, "question_id")
    if question_id in taken:
        raise BadField("question_id stands twice")
    taken.add(question_id)
    return question_id


def _answers(a: Mapping[str, Any], target: str) -> tuple[str, tuple[str, ...]]:
    """What most annotators said (the first mentioned of equals), and the other answers given at least twice."""
    votes = votes_of(a, "answers")
    pred = votes.most_common(1)[0][0]
    if plain(pred) == plain(target):
        raise BadField("counterfact_answer equals the answer before the edit")
    others = [v for v, n in votes.items() if n >= 2 and v != pred]
    return pred, distinct(others, [pred, target]) if others else ()


def _named(row: object) -> str:
    qid = row.get("question_id") if isinstance(row, Mapping) else None
    return f" question {qid}" if isinstance(qid, (int, str)) and len(str(qid)) <= 20 else ""
