"""A stream of edits as an Avalanche benchmark: one experience a year, or every so many edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from avalanche.benchmarks import CLScenario, DatasetExperience
from avalanche.benchmarks.scenarios.generic_scenario import ExperienceAttribute, SequenceCLStream

from streams.base import BadStream, Stream, StreamConfig, TrainPool
from testbed.core.events import LOCALITY_SPLITS, Ask, EditEvent, Question
from testbed.core.registry import STREAMS
from testbed.editors.continual._strategies import dataset_of
from testbed.editors.continual.rows import Rows
from testbed.experiment.answering import answer_base
from testbed.experiment.schedule import checkpoints
from testbed.model import loading
from testbed.model.handle import ModelHandle

SPLITS: dict[str, tuple[str, ...]] = {
    "test": ("edit",),
    "generality": ("text_generality", "image_generality"),
    "locality": LOCALITY_SPLITS,
}
"""Streams of questions and the splits they are made of."""


@dataclass(frozen=True)
class Item:
    """A question of an experience. reference: the answer that is scored; golds: what a generation is compared with."""

    question: Question
    reference: str
    golds: tuple[str, ...]


class EditExperience(DatasetExperience):
    """Some edits in the stream's order, or the questions about them.

    `edits` and `paraphrases` (prompts of the train pool by edit id) are visible in training alone, `questions` in
    evaluation alone, `year` to loggers alone; `dataset` has rows (number, labels, task label 0).
    """

    def __init__(self, dataset: Any, edits: Sequence[EditEvent], paraphrases: Any, questions: Sequence[Item]) -> None:
        super().__init__(dataset=dataset)
        self.edits: Any = ExperienceAttribute(tuple(edits), use_in_train=True)
        self.paraphrases: Any = ExperienceAttribute(paraphrases, use_in_train=True)
        self.questions: Any = ExperienceAttribute(tuple(questions), use_in_eval=True)
        self.year: Any = ExperienceAttribute(edits[0].year)
        self.task_label, self.task_labels = 0, [0]


class EditStream(SequenceCLStream):
    """Experiences that are made when they are first asked for."""

    def __init__(self, name: str, length: int, make: Callable[[int], EditExperience]) -> None:
        self._length, self._make = length, make
        self._made: dict[int, EditExperience] = {}
        super().__init__(name, benchmark=None)  # type: ignore[arg-type]

    def _full_length(self) -> int:
        return self._length

    def _make_experience(self, experience_idx: int) -> EditExperience:
        if experience_idx not in self._made:
            self._made[experience_idx] = self._make(experience_idx)
        return self._made[experience_idx]


class EditBenchmark(CLScenario):
    """`train_stream`, `test_stream`, and `generality_stream` and `locality_stream` where the source has such questions.

    Attributes: handle, the model whose tokens the labels are; rows, the table behind the datasets; source, the stream;
    pool, what editors may learn from.
    """

    def __init__(self, source: Stream, handle: ModelHandle, groups: list[list[EditEvent]]) -> None:
        self.source, self.handle, self.groups = source, handle, groups
        self.rows = Rows(handle)
        self._gone = {e.revises for group in groups for e in group if e.revises}
        for i, group in enumerate(groups):
            if not self._live(group):
                raise BadStream(
                    f"experience {i} (year {group[0].year}) has no edit that is still live at the end, so nothing of it can be tested: "
                    "take more edits an experience, or a stream with StreamConfig(revise=0, revert=0, retire=0)"
                )
        streams = [EditStream("train", len(groups), self._lesson)]
        streams += [EditStream(n, len(groups), lambda i, s=s: self._test(i, s)) for n, s in SPLITS.items() if self._everywhere(s)]
        super().__init__(streams)
        for stream in streams:
            stream.benchmark = self

    @cached_property
    def pool(self) -> TrainPool:
        return self.source.train_pool()

    def _live(self, group: Sequence[EditEvent]) -> list[EditEvent]:
        return [e for e in group if e.kind != "retire" and e.id not in self._gone]

    def _questions(self, group: Sequence[EditEvent], splits: Sequence[str]) -> list[Question]:
        """About edits that no later edit replaces: the right answer holds in every evaluation."""
        return [q for e in self._live(group) for q in self.source.questions(e) if q.split in splits]

    def _everywhere(self, splits: Sequence[str]) -> bool:
        return all(self._questions(group, splits) for group in self.groups)

    def _lesson(self, i: int) -> EditExperience:
        edits = self.groups[i]
        numbers = [self.rows.add(e.ask(), e.target) for e in edits if e.kind != "retire"]
        paraphrases = {e.id: self.source.paraphrases(e) for e in edits}
        return EditExperience(dataset_of(self.rows, numbers), edits, paraphrases, [])

    def _test(self, i: int, splits: Sequence[str]) -> EditExperience:
        items = list(self._items(self._questions(self.groups[i], splits)))
        numbers = [self.rows.add(Ask(x.question.prompt, x.question.image), x.reference) for x in items]
        return EditExperience(dataset_of(self.rows, numbers), self.groups[i], {}, items)

    def _items(self, questions: list[Question]) -> Iterator[Item]:
        """Locality is judged by the unedited model's own answers, which are made here; where it says nothing, nothing is asked."""
        local = [q for q in questions if q.split in LOCALITY_SPLITS]
        said = {a.question_id: a.generated for a in answer_base(self.handle, local, 16)}
        for q in questions:
            golds = ((said[q.id] or ""),) if q.id in said else q.golds
            if golds and golds[0]:
                yield Item(q, golds[0], golds)


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
        model: what `--model` takes, or a loaded model; labels are its tokens.
        edits_per_experience: None makes a year an experience; a number never spans two years.
        config: of the stream, where it is given by name.

    Tested are edits that are still live after the last one, so that an answer is right in every evaluation or in none.
    Raises `BadStream` for a stream without edits or an experience without a live one, `UnknownName`, `BadModel`.
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
