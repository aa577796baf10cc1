"""Cost of questions: a plain loop over `model.generate`, the unedited model here, and an edited one. The table `questions`.

The plain loop takes the prompts in their order, pads them to the left and generates, as evaluation scripts do; it scores no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from streams.base import Stream
from testbed.bench.common import BenchConfig, Make, apply_edits, questions_about, seconds_of
from testbed.core.events import Ask
from testbed.core.grading import natural_stop
from testbed.model.encoding import collate
from testbed.model.generation import greedy_decoding
from testbed.model.handle import ModelHandle
from testbed.model.predictor import ModelPredictor

_BATCH = 64
"""Questions in one batch, those of `ModelPredictor` too."""
_NEW_TOKENS = 16


@dataclass(frozen=True)
class QuestionCost:
    """Milliseconds of one question, CPU time on a CPU and wall time on a GPU, after a first batch that fills the caches."""

    model: str
    editor: str
    questions: int
    plain: float
    """A plain loop over `model.generate`, the unedited model, no score."""
    unedited: float
    """Generation and score by the unedited model."""
    edited: float
    """Generation and score after the edits."""
    share_alike: float
    """Share of the questions that the plain loop and the unedited model answer with the same text."""

    @property
    def faster(self) -> float:
        """How many times the plain loop takes as long as the unedited model here."""
        return self.plain / self.unedited

    @property
    def edited_by_plain(self) -> float:
        return self.edited / self.plain

    @property
    def edited_by_unedited(self) -> float:
        return self.edited / self.unedited


def measure_questions(handle: ModelHandle, stream: Stream, make: Make, config: BenchConfig) -> list[QuestionCost]:
    """The editor makes the stream's first edits in batches of `--batch`; then `--questions` questions about them are asked."""
    events, editor = stream.events(config.edits), make()
    batch = min(config.batch or _BATCH, editor.traits.max_batch or _BATCH)
    editor.prepare(handle, stream.train_pool())
    for step, at in enumerate(range(0, len(events), batch), 1):
        apply_edits(editor, stream, events[at : at + batch], step)
    asks, answers = questions_about(handle, stream, events, config.questions)
    edited, unedited = editor.predictor(), ModelPredictor(handle)
    for predictor in (unedited, edited):
        predictor.generate(asks[:_BATCH], 2)
    plain, said = seconds_of(handle.device, partial(plain_loop, handle, asks))
    own, responses = seconds_of(handle.device, partial(unedited.respond, asks, answers, _NEW_TOKENS))
    changed, _ = seconds_of(handle.device, partial(edited.respond, asks, answers, _NEW_TOKENS))
    alike = sum(a == b.generated for a, b in zip(said, responses))
    n = len(asks)
    return [QuestionCost(handle.name, editor.name, n, 1e3 * plain / n, 1e3 * own / n, 1e3 * changed / n, alike / n)] if n else []


@torch.no_grad()
def plain_loop(handle: ModelHandle, asks: Sequence[Ask]) -> list[str]:
    """Greedy answers by `model.generate`, batch by batch in the order of the questions."""
    out: list[str] = []
    model: Any = handle.model
    with greedy_decoding(handle):
        for at in range(0, len(asks), _BATCH):
            inputs = collate(handle, asks[at : at + _BATCH], side="left").inputs
            new = model.generate(**inputs, max_new_tokens=_NEW_TOKENS)[:, inputs["input_ids"].shape[1] :]
            out += [natural_stop(t) for t in handle.tokenizer.batch_decode(new, skip_special_tokens=True)]
    return out
