"""`okedit-yearly`: counterfactual answers about photos, installed one after another.

With a data root, the OKEDIT files (Guo et al., ICML 2025) on a drawn schedule: they have no dates. Without
one, the simulated world in the same form. `origin` and `time_axis` say which of the two a run has seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from typing import Any

from streams import transforms
from streams.base import BadStream, Stream, StreamConfig, TrainPool
from streams.files.files_or_world import Either
from streams.files.okedit_files import OkeditData, Record, load
from streams.files.pictures import FilePicture, numbered, same_pixels
from streams.files.records import distinct, plain
from testbed.core.events import EditEvent, Question, Split
from testbed.core.registry import STREAMS


@STREAMS.register("okedit-yearly")
class OkeditYearly(Either):
    """OKEDIT files on a yearly schedule, or the simulated world in OKEDIT form where no data root is given."""

    summary = "counterfactual answers about photos (OKEDIT files with --data-root, else the simulated world)"
    time_axis = "scheduled"
    licence = "OKEDIT: none stated (questions: OK-VQA, CC BY 4.0; photos: COCO, Flickr terms); simulated world: MIT"
    size = "9,009 and 5,046 records (train, test); the world without end"

    form = "okedit"

    def files(self, config: StreamConfig) -> Stream:
        return OkeditFiles(config)


class OkeditFiles(Stream):
    """The official files. Raises `BadStream` where they, or the configuration, cannot be used."""

    name = "okedit-yearly"
    summary = "OKEDIT files"
    time_axis = "scheduled"
    licence = OkeditYearly.licence

    def __init__(self, config: StreamConfig) -> None:
        super().__init__(config)
        if problems := config.problems():
            raise BadStream("; ".join(problems))
        if config.data_root is None:
            raise BadStream("OkeditFiles needs a data root: the folder with mscoco_*_annotations_train.json")
        self._data: OkeditData = load(config.data_root, config.missing_images)
        self.skipped = list(self._data.skipped)
        self._edited = tuple(r for r in self._data.records if r.role == "edit")
        self._by_source = {self._name_of(r): r for r in self._edited}
        self._reserved = _by_prompt(r for r in self._data.records if r.role != "probe")
        self._controls = tuple(r for r in self._data.records if r.role == "probe" and not self._is_reserved(r.photo, r.question))
        edited_photos = {r.image_id for r in self._edited}
        self._far = tuple(r for r in self._controls if r.image_id not in edited_photos)
        self._siblings: dict[int, list[Record]] = {}
        for r in self._controls:
            self._siblings.setdefault(r.image_id, []).append(r)

    @property
    def origin(self) -> str:
        d = self._data
        controls = len(d.records) - len(self._edited)
        return f"files of OKEDIT form, {d.split} ({len(d.records):,} usable of {d.total:,} records, {controls:,} of them never edited)"

    def data_hash(self) -> str:
        """Hash of both JSON files and of the photos' names and sizes."""
        return self._data.digest

    def events(self, n: int) -> list[EditEvent]:
        facts = [self._fact(r) for r in self._edited]
        return list(islice(transforms.scheduled(facts, self._values, self.config, "okedit "), max(n, 0)))

    def questions(self, event: EditEvent) -> tuple[Question, ...]:
        """See `Stream.questions`. After a retire the answer is the one before any edit."""
        record = self._record_of(event)
        value = event.target if event.kind != "retire" else record.pred
        ask = _Asker(event, value)
        also = record.aliases if value == record.pred else ()
        ask.add("edit", record.question, record.photo, value, also)
        for prompt in record.held_out:
            ask.add("text_generality", prompt, record.photo, value, also)
        for picture in self._pictures("rephrased_images", record):
            ask.add("image_generality", record.question, picture, value, also)
        if event.previous is not None:
            ask.add("stale", record.question, record.photo, event.previous, record.aliases if event.previous == record.pred else ())
        self._ask_locality(ask, record)
        return tuple(ask.asked)

    def _ask_locality(self, ask: _Asker, record: Record) -> None:
        picture = self._locality_picture(record)
        answer = record.locality_answer
        if picture is not None and (answer is None or ask.tells_apart(answer)):
            ask.add("locality_hard", record.question, picture, answer)
        for sibling in self._siblings.get(record.image_id, []):
            if record.photo and plain(sibling.question) != plain(record.question) and ask.tells_apart(sibling.pred):
                ask.add("locality_sibling", sibling.question, sibling.photo, sibling.pred, sibling.aliases)
        start = int(transforms.share("okedit far", record.qid) * len(self._far))
        far = next((r for r in (*self._far[start:], *self._far[:start]) if ask.tells_apart(r.pred)), None)
        if far is not None:
            ask.add("locality_far", far.question, far.photo, far.pred, far.aliases)

    def general(self) -> tuple[Question, ...]:
        return tuple(_belief(r, r.question, "unedited photos") for r in self._controls)

    def paraphrases(self, event: EditEvent) -> tuple[str, ...]:
        asked = [q.prompt for q in self.questions(event)]
        return distinct(self._record_of(event).train, [event.prompt, *asked])

    def train_pool(self) -> TrainPool:
        """The questions, and their train paraphrases, of the records set aside for training."""
        return TrainPool(
            tuple(_belief(r, p, "train pool") for r in self._data.records if r.role == "train" for p in (r.question, *r.train))
        )

    def beliefs(self) -> Iterator[Question]:
        """Every question and train paraphrase with its answer before any edit, the locality pictures among them.

        Where one question of one picture has two answers, neither is a belief. Reads every picture file.
        """
        answers: dict[tuple[str, str], set[str]] = {}
        for q in self._all_beliefs():
            answers.setdefault(_place(q), set()).add(plain(q.answer or ""))
        given: set[tuple[str, str]] = set()
        for q in self._all_beliefs():
            if len(answers[_place(q)]) == 1 and _place(q) not in given:
                given.add(_place(q))
                yield q

    def _all_beliefs(self) -> Iterator[Question]:
        for r in self._data.records:
            for prompt in (r.question, *r.train):
                yield _belief(r, prompt, "edited photos" if r.role == "edit" else "unedited photos")
            picture = self._locality_picture(r)
            if picture is not None and r.locality_answer:
                yield Question("general", r.question, r.locality_answer, image=picture, topic="locality pictures")

    def _fact(self, r: Record) -> transforms.EditableFact:
        subject = f"image {r.image_id}, question {r.qid}"
        return transforms.EditableFact(r.question, r.target, self._name_of(r), r.photo, r.pred, subject, r.category, r.aliases)

    @cached_property
    def _values(self) -> dict[str, list[str]]:
        """What a revision may draw from: the counterfactual answers of each category, sorted."""
        pool: dict[str, dict[str, str]] = {}
        for r in self._data.records:
            pool.setdefault(r.category, {}).setdefault(plain(r.target), r.target)
        return {category: sorted(values.values()) for category, values in pool.items()}

    def _name_of(self, r: Record) -> str:
        return f"okedit {self._data.split} question {r.qid}"

    def _record_of(self, event: EditEvent) -> Record:
        if event.source not in self._by_source:
            raise BadStream(f"event {event.id} ({event.source or 'no source'}) is not of this stream ({self.origin})")
        return self._by_source[event.source]

    def _pictures(self, folder: str, r: Record) -> list[FilePicture]:
        """Pictures `folder/{question id}/{0, 1, ...}.*`; none for a record that is asked without its photo."""
        return list(numbered(self._data.root, f"{folder}/{r.qid}")) if r.photo else []

    def _locality_picture(self, r: Record) -> FilePicture | None:
        """Picture 0 of the locality folder, unless that very question about that very picture is edited or trained on."""
        first = next(iter(self._pictures("locality_images_dalle2", r)), None)
        return None if first is None or self._is_reserved(first, r.question) else first

    def _is_reserved(self, picture: FilePicture | None, question: str) -> bool:
        others = self._reserved.get(plain(question), [])
        if picture is None:
            return any(o.photo is None for o in others)
        return any(o.photo is not None and same_pixels(o.photo, picture) for o in others)


class _Asker:
    """Collects the questions of one event; a repeated question is asked once."""

    def __init__(self, event: EditEvent, value: str) -> None:
        self.event = event
        self.asked: list[Question] = []
        self._ids: set[str] = set()
        self._values = {plain(v) for v in (value, event.previous) if v}

    def tells_apart(self, answer: str) -> bool:
        """Whether an answer differs from the edit's new and old value, so that a leak would show."""
        return plain(answer) not in self._values

    def add(self, split: Split, prompt: str, image: FilePicture | None, answer: str | None, aliases: tuple[str, ...] = ()) -> None:
        topic = self.event.relation or ""
        q = Question(split, prompt, answer, self.event.id, image, aliases, topic)
        if q.id not in self._ids:
            self._ids.add(q.id)
            self.asked.append(q)


def _belief(r: Record, prompt: str, topic: str) -> Question:
    return Question("general", prompt, r.pred, image=r.photo, aliases=r.aliases, topic=topic)


def _place(q: Question) -> tuple[str, str]:
    return (q.image.key if q.image is not None else ""), plain(q.prompt)


def _by_prompt(records: Any) -> dict[str, list[Record]]:
    out: dict[str, list[Record]] = {}
    for r in records:
        out.setdefault(plain(r.question), []).append(r)
    return out
