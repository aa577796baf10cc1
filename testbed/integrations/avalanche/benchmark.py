"""A stream of edits as an Avalanche benchmark, in which an experience is a year or a number of edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import groupby
from typing import Any

from avalanche.benchmarks import CLScenario, DatasetExperience
from avalanche.benchmarks.scenarios.generic_scenario import ExperienceAttribute, SequenceCLStream

from streams.base import BadStream, Stream, StreamConfig, TrainPool
from testbed.core.events import LOCALITY_SPLITS, EditEvent, Question
from testbed.core.registry import STREAMS
from testbed.editors.continual._strategies import dataset_of
from testbed.editors.continual.rows import AnswerRows
from testbed.experiment.answering import answer_base
from testbed.experiment.schedule import checkpoints
from testbed.model import loading
from testbed.model.handle import ModelHandle

SPLITS = {"test": ("edit",), "generality": ("text_generality", "image_generality"), "locality": LOCALITY_SPLITS}
"""Evaluation streams and the question splits of each."""


@dataclass(frozen=True)
class EvalItem:
    """A question of an experience. reference: the answer that is scored; golds: the answers that a generation may equal."""

    question: Question
    reference: str
    golds: tuple[str, ...]


class EditExperience(DatasetExperience):
    """Some edits in the order of the stream, or the questions about them.

    Avalanche's masks show `edits` and `paraphrases` (prompts of the train pool by edit id) in training only,
    `questions` in evaluation only, and `year` to loggers only. `dataset` has samples (row number, labels, task label 0).
    """

    def __init__(self, dataset: Any, edits: Sequence[EditEvent], paraphrases: Any, questions: Sequence[EvalItem]) -> None:
        super().__init__(dataset=dataset)
        self.edits: Any = ExperienceAttribute(tuple(edits), use_in_train=True)
        self.paraphrases: Any = ExperienceAttribute(paraphrases, use_in_train=True)
        self.questions: Any = ExperienceAttribute(tuple(questions), use_in_eval=True)
        self.year: Any = ExperienceAttribute(edits[0].year)
        self.task_label, self.task_labels = 0, [0]


class EditStream(SequenceCLStream):
    """Experiences that are made when they are first used."""

    def __init__(self, name: str, length: int, make: Callable[[int], EditExperience]) -> None:
        self._length, self._make = length, cache(make)
        super().__init__(name, benchmark=None)  # type: ignore[arg-type]

    def _full_length(self) -> int:
        return self._length

    def _make_experience(self, experience_idx: int) -> EditExperience:
        return self._make(experience_idx)


class EditBenchmark(CLScenario):
    """`train_stream`, `test_stream`, and `generality_stream` and `locality_stream` where the source has such questions.

    handle: the model that tokenizes the labels. rows: the table behind the datasets. source: the stream of edits.
    groups: the edits of each experience. pool: the train pool, from which editors may learn.
    """

    def __init__(self, source: Stream, handle: ModelHandle, groups: list[list[EditEvent]]) -> None:
        self.source, self.handle, self.groups = source, handle, groups
        self.rows = AnswerRows(handle)
        self._revised = {e.revises for group in groups for e in group if e.revises}
        for i, group in enumerate(groups):
            if not self._live(group):
                raise BadStream(
                    f"experience {i} (year {group[0].year}) has no edit that is still live at the end, so nothing of it can be tested: "
                    "take more edits for each experience, or a stream with StreamConfig(revise=0, revert=0, retire=0)"
                )
        streams = [EditStream("train", len(groups), self._train_experience)]
        for name, splits in SPLITS.items():
            if all(self._questions(group, splits) for group in groups):
                streams.append(EditStream(name, len(groups), partial(self._eval_experience, splits)))
        super().__init__(streams)
        for stream in streams:
            stream.benchmark = self

    @cached_property
    def pool(self) -> TrainPool:
        return self.source.train_pool()

    def _live(self, group: Sequence[EditEvent]) -> list[EditEvent]:
        return [e for e in group if e.kind != "retire" and e.id not in self._revised]

    def _questions(self, group: Sequence[EditEvent], splits: Sequence[str]) -> list[Question]:
        """The questions about edits that no later edit replaces, because their right answer is the same in every evaluation;
        questions that follow from several edits are left out."""
        return [q for e in self._live(group) for q in self.source.questions(e) if q.split in splits and not q.needs]

    def _train_experience(self, i: int) -> EditExperience:
        edits = self.groups[i]
        numbers = [self.rows.add(e.ask(), e.target) for e in edits if e.kind != "retire"]
        paraphrases = {e.id: self.source.paraphrases(e) for e in edits}
        return EditExperience(dataset_of(self.rows, numbers), edits, paraphrases, [])

    def _eval_experience(self, splits: Sequence[str], i: int) -> EditExperience:
        items = list(self._items(self._questions(self.groups[i], splits)))
        numbers = [self.rows.add(x.question.ask(), x.reference) for x in items]
        return EditExperience(dataset_of(self.rows, numbers), self.groups[i], {}, items)

    def _items(self, questions: list[Question]) -> Iterator[EvalItem]:
        """Questions with their references: for locality the answer of the unedited model, and no question where that is empty."""
        local = [q for q in questions if q.split in LOCALITY_SPLITS]
        own = {a.question_id: a.generated for a in answer_base(self.handle, local, 16)}
        for q in questions:
            golds = ((own[q.id] or ""),) if q.id in own else q.golds
            if golds and golds[0]:
                yield EvalItem(q, golds[0], golds)


def edit_benchmark(
    stream: str | Stream,
    model: str | ModelHandle = "tiny",
    edits: int = 500,
    edits_per_experience: int | None = None,
    config: StreamConfig | None = None,
) -> EditBenchmark:
    """An Avalanche benchmark of a stream's first edits.

    Args:
        stream: a stream's name (see --list) or a stream.
        model: a value of `--model`, or a loaded model; it tokenizes the labels.
        edits: number of edits, from the first on.
        edits_per_experience: None makes each year an experience; a number makes more of them, none with edits of two years.
        config: configuration of a stream that is given by name.

    Questions concern the edits that are still live after the last one, so that a right answer is the same in every
    evaluation. Raises `BadStream` for a stream without edits or an experience without a live one, `UnknownName` for a
    stream that does not exist, and `BadModel`.
    """
    source: Stream = STREAMS.get(stream)(config or StreamConfig()) if isinstance(stream, str) else stream
    handle = loading.load(model) if isinstance(model, str) else model
    events = source.events(edits)
    if not events:
        raise BadStream(f"{source.name} ({source.origin}) yields no edit of the {edits} asked for; skipped records: {len(source.skipped)}")
    if edits_per_experience is None:
        groups = [list(g) for _, g in groupby(events, key=lambda e: e.year)]
    else:
        groups = [[a.event for a in applied] for _, applied in checkpoints(events, edits_per_experience)]
    return EditBenchmark(source, handle, groups)
