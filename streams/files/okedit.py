"""`okedit-yearly`: counterfactual answers about photos, installed one after another.

With a data root, the OKEDIT files (Guo et al., ICML 2025) on a drawn schedule: they have no dates. Without
one, the simulated world in the same form. `origin` and `time_axis` say which of the two a run has seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

from streams.base import BadStream, StreamConfig, TrainPool
from streams.files.entry import EntryData, EntryQuestion, FactEntry, QuestionCollector, rotated
from streams.files.entry_stream import EntryStream
from streams.files.files_or_world import FilesOrWorld
from streams.files.okedit_files import OkeditFolder, load
from streams.files.pictures import FilePicture, numbered, same_pixels
from streams.files.records import distinct, plain
from testbed.core.events import EditEvent
from testbed.core.registry import STREAMS

_LICENCE = "OKEDIT: none stated (questions: OK-VQA, CC BY 4.0; photos: COCO, Flickr terms); simulated world: MIT"


class OkeditFiles(EntryStream):
    """The official files. Raises `BadStream` where they, or the configuration, cannot be used.

    Three steps differ from other sources. A record's pictures lie in folders that are listed when they are needed. Copies
    of a photo are found by their pixels. Probes ask every held-out paraphrase, also one that equals an edited question.
    """

    name = "okedit-yearly"
    summary = "OKEDIT files"
    licence = _LICENCE
    supports = frozenset()
    purpose = "okedit "
    topics = {"edit": "edited photos", "probe": "unedited photos", "train": "unedited photos", "locality_hard": "locality pictures"}

    def __init__(self, config: StreamConfig) -> None:
        super().__init__(config)
        self._reserved = set()
        edited = {self._folder.details[e.source].image_id for e in self._edited}
        self._far_pool = [e for e in self._controls if self._folder.details[e.source].image_id not in edited]

    def read(self, config: StreamConfig) -> EntryData:
        if config.data_root is None:
            raise BadStream("OkeditFiles needs a data root: the folder with mscoco_*_annotations_train.json")
        self._folder: OkeditFolder = load(config.data_root, config.missing_images)
        return self._folder.data

    @property
    def origin(self) -> str:
        usable, controls = len(self._data.entries), len(self._data.entries) - len(self._edited)
        return f"{self._data.origin} ({usable:,} usable of {self._folder.total:,} records, {controls:,} of them never edited)"

    def own_questions(self, entry: FactEntry) -> Iterator[EntryQuestion]:
        """The question with each rephrased picture, and with picture 0 of the locality folder.

        The latter is left out where that very question about that very picture is edited or trained on.
        """
        for picture in self._pictures("rephrased_images", entry):
            yield EntryQuestion("image_generality", entry.prompt, image=picture)
        for picture in self._pictures("locality_images_dalle2", entry)[:1]:
            if not any(same_pixels(photo, picture) for photo in self._reserved_photos.get(plain(entry.prompt), [])):
                yield EntryQuestion("locality_hard", entry.prompt, self._folder.details[entry.source].locality_answer, picture)

    def _pictures(self, folder: str, entry: FactEntry) -> list[FilePicture]:
        """Pictures `folder/{question id}/{0, 1, ...}.*`; none for a record that is asked without its photo."""
        if not isinstance(entry.image, FilePicture):
            return []
        return list(numbered(entry.image.root, f"{folder}/{self._folder.details[entry.source].question_id}"))

    @cached_property
    def _reserved_photos(self) -> dict[str, list[FilePicture]]:
        """By question, the photos that it is edited or trained on with."""
        out: dict[str, list[FilePicture]] = {}
        for e in self._data.entries:
            if e.role != "probe" and isinstance(e.image, FilePicture):
                out.setdefault(plain(e.prompt), []).append(e.image)
        return out

    def is_unaffected(self, collector: QuestionCollector, question: EntryQuestion) -> bool:
        return question.answer is None or collector.tells_apart(question.answer)

    def _far(self, collector: QuestionCollector, entry: FactEntry) -> FactEntry | None:
        """A control about a photo that no event touches, whose answer tells a leak apart."""
        order = rotated(self._far_pool, "okedit far", self._folder.details[entry.source].question_id)
        return next((c for c in order if collector.tells_apart(c.previous)), None)

    def paraphrases(self, event: EditEvent) -> tuple[str, ...]:
        return distinct(self._entry_of(event).train, [event.prompt, *(q.prompt for q in self.questions(event))])

    def train_pool(self) -> TrainPool:
        """The questions, and their train paraphrases, of the records set aside for training."""
        pool = [e for e in self._data.entries if e.role == "train"]
        return TrainPool(tuple(e.as_belief(p, "train pool") for e in pool for p in (e.prompt, *e.train)))


@STREAMS.register("okedit-yearly")
class OkeditYearly(FilesOrWorld):
    """OKEDIT files on a yearly schedule, or the simulated world in OKEDIT form where no data root is given."""

    summary = "counterfactual answers about photos (OKEDIT files with --data-root, else the simulated world)"
    time_axis = "scheduled"
    licence = _LICENCE
    size = "9,009 and 5,046 records (train, test); the world without end"
    form, files = "okedit", OkeditFiles
