"""Search of an editor's settings: one field after the other, by what an editor does to a few development edits.

A setting's score is the harmonic mean of three accuracies (the edits, their paraphrases, and answers to unrelated questions held
against those of the unedited model), times the ratio of perplexities of text, unedited over edited, where that is below 1. An
editor that breaks the model therefore scores about 0. An accuracy counts as at least 0.05, so that settings of a method that never
generalises still differ. The answers to edits and paraphrases count half by their tokens, given the tokens before them, and half by
free generation: a prompt that lets the model go on, or begin with other words, is right by the first and never by the second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from streams.base import Stream
from testbed.core.events import LOCALITY_SPLITS, EditBatch, EditEvent, Question
from testbed.core.grading import exact
from testbed.editors.base import BadEditor, Editor
from testbed.model.handle import ModelHandle
from testbed.model.predictor import ModelPredictor, Predictor

MOST_SETTINGS, EDITS, TEXTS = 16, 12, 24
"""Most settings of one editor, edits of one setting, and texts by which perplexity is measured."""
LEAST = 0.05
"""Smallest accuracy that counts in a score."""
Settings = dict[str, Any]
GRIDS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("grids.yaml").read_text(encoding="utf-8"))
"""By editor and field the values to try."""


@dataclass(frozen=True)
class Trial:
    """What one setting does to the development edits; accuracies in [0, 1], nan where there is no such question.

    perplexity: ratio, edited over unedited. seconds: CPU time of one edit, preparation included. failed: edits that failed.
    """

    settings: Settings
    success: float
    generality: float
    locality: float
    perplexity: float
    seconds: float
    failed: int

    @property
    def score(self) -> float:
        parts = [x for x in (self.success, self.generality, self.locality) if not math.isnan(x)]
        if not parts or not math.isfinite(self.perplexity):
            return 0.0
        return len(parts) / sum(1 / max(x, LEAST) for x in parts) * min(1.0, 1 / self.perplexity)


@dataclass
class DevelopmentSet:
    """The development edits of a stream and the questions about them, with the answers of the unedited model."""

    handle: ModelHandle
    stream: Stream
    events: list[EditEvent]
    batch: int = 1

    @cached_property
    def edits(self) -> list[Question]:
        return self._of_split("edit")

    @cached_property
    def paraphrases(self) -> list[Question]:
        return self._of_split("text_generality")

    @cached_property
    def unrelated(self) -> list[tuple[Question, str]]:
        """Locality questions, each with what the unedited model answers."""
        found = [q for split in LOCALITY_SPLITS for q in self._of_split(split)]
        said = ModelPredictor(self.handle).generate([q.ask() for q in found], 8)
        return [(q, s) for q, s in zip(found, said) if s]

    @cached_property
    def texts(self) -> list[str]:
        """Running text of the stream, else statements of facts that no edit touches."""
        general = self.stream.general()
        running = [q.prompt for q in general if q.split == "text"]
        return (running or [f"{q.prompt} {q.answer}" for q in general if q.answer and q.image is None])[:TEXTS]

    @cached_property
    def loss(self) -> float:
        """Mean negative log-likelihood of a token of the texts, unedited."""
        return self.text_loss(ModelPredictor(self.handle))

    def text_loss(self, predictor: Predictor) -> float:
        """Mean negative log-likelihood of a token of the texts; nan without texts."""
        logprobs = np.concatenate(predictor.text_logprobs(self.texts)) if self.texts else np.array([])
        return -float(logprobs.mean()) if len(logprobs) else math.nan

    def _of_split(self, split: str) -> list[Question]:
        """The first question of this split about each event."""
        first = (next((q for q in self.stream.questions(e) if q.split == split), None) for e in self.events)
        return [q for q in first if q is not None]


def try_settings(data: DevelopmentSet, create: Callable[[], Editor], settings: Settings) -> Trial:
    """Make the development edits with a fresh editor and measure it."""
    loss, unrelated = data.loss, data.unrelated  # before the clock starts
    start = time.process_time()
    editor, failed = create(), 0
    editor.prepare(data.handle, data.stream.train_pool())
    size = min(data.batch, editor.traits.max_batch or data.batch)
    for step, at in enumerate(range(0, len(data.events), size), 1):
        part = tuple(data.events[at : at + size])
        failed += len(editor.apply(EditBatch(part, step, {e.id: data.stream.paraphrases(e) for e in part})).failed)
    seconds = (time.process_time() - start) / len(data.events)
    predictor = editor.predictor()
    success, generality = (answer_accuracy(predictor, questions) for questions in (data.edits, data.paraphrases))
    ratio = 1.0 if math.isnan(loss) else math.exp(min(50.0, data.text_loss(predictor) - loss))
    return Trial(settings, success, generality, _accuracy(predictor, unrelated), ratio, seconds, failed)


def _accuracy(predictor: Predictor, answered: Sequence[tuple[Question, str]]) -> float:
    """Mean over questions of the share of answer tokens that are the likeliest; nan without questions."""
    scores = predictor.score([q.ask() for q, _ in answered], [a for _, a in answered])
    return float(np.mean([s.hits.mean() for s in scores])) if scores else math.nan


def answer_accuracy(predictor: Predictor, questions: Sequence[Question]) -> float:
    """Mean over questions of the token accuracy and of whether the free answer is right; nan without questions."""
    if not questions:
        return math.nan
    found = predictor.respond([q.ask() for q in questions], [q.answer or "" for q in questions])
    tokens = [r.score.hits.mean() for r in found if r.score is not None]
    right = [exact(r.generated, q.golds) for r, q in zip(found, questions)]
    return float(np.mean(tokens) + np.mean(right)) / 2


def search(fields: Mapping[str, Sequence[Any]], measure: Callable[[Settings], Trial], seconds: float) -> Iterator[Trial]:
    """Trials of one setting after the other, the default first, then each field's values with the best of the fields before.

    seconds: CPU time after which no further setting is begun. At most 16 settings are tried. A setting that the editor refuses
    is left out.
    """
    start, tried = time.process_time(), 1
    best = measure({})
    yield best
    for name, values in fields.items():
        base = best.settings
        for value in values:
            if tried >= MOST_SETTINGS or time.process_time() - start > seconds:
                return
            tried += 1
            try:
                trial = measure({**base, name: value})
            except BadEditor:
                continue
            yield trial
            if (trial.score, trial.success) > (best.score, best.success):
                best = trial


def grid(editor: str, n_layers: int) -> dict[str, list[Any]]:
    """The values to try for an editor (of a variant or a wrapped one, those of its host), layers by their shares of the depth."""
    host = editor.partition("[")[0]
    rows = GRIDS.get(host) or GRIDS.get(host.partition("+")[0]) or {}
    return {name: _layers(values, n_layers) if isinstance(values, dict) else list(values) for name, values in rows.items()}


def _layers(given: Mapping[str, Any], n_layers: int) -> list[Any]:
    """Layers, or tuples of neighbouring ones that end there, at these shares of the depth, each once."""
    width, out = given.get("layers"), []
    for share in given["depth"]:
        last = min(n_layers - 1, round(share * (n_layers - 1)))
        out.append(last if width is None else tuple(range(max(0, last - width + 1), last + 1)))
    return list(dict.fromkeys(out))
