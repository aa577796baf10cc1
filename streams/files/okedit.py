"""`okedit-yearly`: counterfactual answers about photos, installed one after another.

With a data root, the OKEDIT files (Guo et al., ICML 2025) on a drawn schedule: they have no dates. Without
one, the simulated world in the same form. `origin` and `time_axis` say which of the two a run has used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from streams.base import BadStream, StreamConfig, TrainPool
from streams.files.entry import EntryData, EntryQuestion, FactEntry, QuestionCollector, rotated, with_roles
from streams.files.entry_stream import EntryStream
from streams.files.fields import RecordReader
from streams.files.files_or_world import or_world
from streams.files.pictures import FilePicture, coco_photos, numbered, same_pixels
from streams.files.records import BadField, distinct, id_of, normalize, optional_text, read_table, text_at, texts_at, votes_of
from streams.files.tables import find_files
from testbed.core.events import content_id

_PREFIX, _SUFFIX = "mscoco_", "_annotations_train.json"
_EXPECTED = (
    "mscoco_*_annotations_train.json, OpenEnded_mscoco_*_questions_train.json, *2014/COCO_*.jpg, rephrased_images/, locality_images_dalle2/"
)


class Details(NamedTuple):
    """Fields of an OKEDIT record that its `FactEntry` does not hold."""

    question_id: int
    image_id: int
    locality_answer: str | None


@or_world("okedit-yearly", form="okedit")
class OkeditFiles(EntryStream):
    """The files of OKEDIT on a yearly schedule. Raises `BadStream` where they, or the configuration, cannot be used.

    Two steps differ from other sources: the pictures of a record lie in folders, which are listed when they are needed;
    copies of a photo are found by their pixels.
    """

    summary = "counterfactual answers about photos (OKEDIT files with --data-root, else the simulated world)"
    licence = "OKEDIT: none stated (questions: OK-VQA, CC BY 4.0; photos: COCO, Flickr terms); simulated world: MIT"
    size = "9,009 and 5,046 records (train, test); the world without end"
    supports = frozenset()
    purpose = "okedit "
    topics = {"edit": "edited photos", "probe": "unedited photos", "train": "unedited photos", "locality_hard": "locality pictures"}

    def __init__(self, config: StreamConfig) -> None:
        super().__init__(config)
        edited = {self._details[e.source].image_id for e in self._edited}
        self._far_pool = [e for e in self._controls if self._details[e.source].image_id not in edited]

    def read(self, config: StreamConfig) -> EntryData:
        """Read a folder of the OKEDIT layout, or its annotation file; entries by rising question id. No picture is decoded."""
        annotations, questions, split = find_split(config.data_root)
        root = annotations.parent
        top, rows, annotations_digest = read_table(annotations, "annotations")
        _, question_rows, questions_digest = read_table(questions, "questions")
        photos, self._total = coco_photos(root, split), len(rows)
        reader = _OkeditReader(
            root=root, split=split, missing=config.absent_images, photos=photos, categories=_categories(top), total=len(rows)
        )
        reader.index(question_rows, questions.name)
        entries = list(reader.usable(rows, reader.entry, lambda i, row: f"{annotations.name} annotations[{i}]{_named(row)}"))
        for question_id in sorted(reader.questions.keys() - reader.ids):
            reader.skip(f"{questions.name} question {question_id}", "no annotation has this question_id")
        reader.require(entries, str(root), f" Expected {_EXPECTED}.")
        used = sorted((e.image.name, e.image.size) for e in entries if isinstance(e.image, FilePicture))
        digest = content_id(annotations_digest, questions_digest, used)
        self._details = details = reader.details
        entries.sort(key=lambda e: details[e.source].question_id)
        with_role = with_roles(entries, "okedit control", lambda e: details[e.source].question_id)
        return EntryData(f"files of OKEDIT form, {split}", with_role, tuple(reader.skipped), digest)

    @property
    def origin(self) -> str:
        usable, controls = len(self._data.entries), len(self._data.entries) - len(self._edited)
        return f"{self._data.origin} ({usable:,} usable of {self._total:,} records, {controls:,} of them never edited)"

    def brought(self, entry: FactEntry) -> Iterator[EntryQuestion]:
        """The question with each rephrased picture, and with picture 0 of the locality folder.

        The latter is left out where that very question about that very picture is edited or trained on.
        """
        for picture in self._pictures("rephrased_images", entry):
            yield EntryQuestion("image_generality", entry.prompt, image=picture)
        for picture in self._pictures("locality_images_dalle2", entry)[:1]:
            if not any(same_pixels(photo, picture) for photo in self._reserved_photos.get(normalize(entry.prompt), [])):
                yield EntryQuestion("locality_hard", entry.prompt, self._details[entry.source].locality_answer, picture)

    def _pictures(self, folder: str, entry: FactEntry) -> list[FilePicture]:
        """Pictures `folder/{question id}/{0, 1, ...}.*`; none for a record that is asked without its photo."""
        if not isinstance(entry.image, FilePicture):
            return []
        return list(numbered(entry.image.root, f"{folder}/{self._details[entry.source].question_id}"))

    @cached_property
    def _reserved_photos(self) -> dict[str, list[FilePicture]]:
        """For each question the photos about which it is edited or trained on."""
        out: dict[str, list[FilePicture]] = {}
        for e in self._data.entries:
            if e.role != "probe" and isinstance(e.image, FilePicture):
                out.setdefault(normalize(e.prompt), []).append(e.image)
        return out

    def is_unaffected(self, collector: QuestionCollector, question: EntryQuestion) -> bool:
        return question.answer is None or collector.reveals_leak(question.answer)

    def _far(self, collector: QuestionCollector, entry: FactEntry) -> FactEntry | None:
        """A control about a photo that no event touches, whose answer tells a leak apart."""
        order = rotated(self._far_pool, "okedit far", self._details[entry.source].question_id)
        return next((c for c in order if collector.reveals_leak(c.previous)), None)

    def train_pool(self) -> TrainPool:
        """The questions, and their train paraphrases, of the records set aside for training."""
        pool = [e for e in self._data.entries if e.role == "train"]
        return TrainPool(tuple(e.as_belief(p, "train pool") for e in pool for p in (e.prompt, *e.train)), find_edits=self._train_edits)


def find_split(root: Path | None) -> tuple[Path, Path, str]:
    """The annotation file, the question file and the split's name. Raises `BadStream` that says what was found."""
    found = find_files(root, [f"{_PREFIX}*{_SUFFIX}"], "OKEDIT")
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise BadStream(f"{root} holds {len(found)} OKEDIT splits: give the annotation file of one as data root: {names}.")
    split = found[0].name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    questions = found[0].with_name(f"OpenEnded_{_PREFIX}{split}_questions_train.json")
    if not questions.is_file():
        raise BadStream(f"{questions} is absent: {found[0].name} needs the question file of the same split beside it.")
    return found[0], questions, split


def _categories(top: Mapping[str, Any]) -> dict[str, str]:
    """OK-VQA's own table of question types, where the file carries it."""
    table = top.get("question_types")
    if not isinstance(table, dict):
        return {}
    named = RecordReader().usable(table, lambda code, _: (code, text_at(table, code)), "question type")
    return dict(named)  # a code without a name then names the category itself


@dataclass(kw_only=True)
class _OkeditReader(RecordReader):
    """Turns rows into entries and keeps their details."""

    root: Path
    split: str
    missing: Literal["skip", "text", "caption"]
    photos: Mapping[int, str]
    categories: Mapping[str, str]
    questions: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    details: dict[str, Details] = field(default_factory=dict)
    ids: set[int] = field(default_factory=set)
    _by_question: dict[tuple[int | None, str], list[FilePicture | None]] = field(default_factory=dict)

    def index(self, rows: list[Any], file: str) -> None:
        """Read the questions by their ids; the first of a repeated id stays."""
        ids: set[int] = set()
        found = self.usable(rows, lambda row, _: (_new_id(row, ids), row), lambda i, row: f"{file} questions[{i}]{_named(row)}")
        self.questions.update(found)

    def entry(self, row: Any, _: str) -> FactEntry:
        """The record of one annotation. Raises `BadField` or `BadPicture` where it cannot be used."""
        question_id = _new_id(row, self.ids)
        if question_id not in self.questions:
            raise BadField("no question has this question_id")
        q, image_id = self.questions[question_id], id_of(row, "image_id")
        if q.get("image_id") is not None and id_of(q, "image_id") != image_id:
            raise BadField("image_id differs between question and annotation")
        question, target = text_at(q, "question"), text_at(row, "counterfact_answer")
        previous, aliases = _answers(row, target)
        category = self._category(row)
        rephrased, train = texts_at(q, "rephrased_questions"), texts_at(q, "rephrased_questions_train")
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
        name = optional_text(a, "question_type")
        return (self.categories.get(name) or f"question type {name}") if name else "other"

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
        earlier = self._by_question.setdefault((photo.size if photo else None, normalize(question)), [])
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
    """The most frequent answer of the annotators (the first mentioned of equals), and the others given at least twice."""
    votes = votes_of(a, "answers")
    pred = votes.most_common(1)[0][0]
    if normalize(pred) == normalize(target):
        raise BadField("counterfact_answer equals the answer before the edit")
    others = [v for v, n in votes.items() if n >= 2 and v != pred]
    return pred, distinct(others, [pred, target]) if others else ()


def _named(row: object) -> str:
    qid = row.get("question_id") if isinstance(row, Mapping) else None
    return f" question {qid}" if isinstance(qid, (int, str)) and len(str(qid)) <= 20 else ""
