"""Cost of the same edits and questions late in a run against early, measured again in turn: the table `late`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from statistics import median

from testbed.bench.common import BenchConfig, Rows, apply_edits, questions_about, seconds_of
from testbed.editors.base import Editor
from testbed.experiment.rebuild import StoredRun, rebuild
from testbed.storage.files import StoreError

_REPETITIONS = 3
"""Number of times that both states answer the same questions."""
Milliseconds = list[float]
"""Milliseconds of one edit or question, one value for each step or repetition."""


@dataclass(frozen=True)
class LateCost:
    """An editor's state after `early` edits and after `late`: both make the same next edits and answer the same questions.

    Milliseconds of one edit or question, CPU time on a CPU and wall time on a GPU; medians over steps, or over repetitions of
    the questions. The two states take turns, so that other work on the machine slows both alike.
    """

    editor: str
    early: int
    late: int
    edit_early: float | None
    edit_late: float | None
    question_early: float | None
    question_late: float | None

    @property
    def edit_times(self) -> float | None:
        return self.edit_late / self.edit_early if self.edit_late and self.edit_early else None

    @property
    def question_times(self) -> float | None:
        return self.question_late / self.question_early if self.question_late and self.question_early else None


def late_rows(config: BenchConfig) -> Rows:
    """The editors of the run folder, after about `--at` edits and at the end of the run.

    Raises `StoreError` where the folder is no run, holds no state, or has no more than `--at` edits.
    """
    stored = rebuild(config.run or Path())
    made = list(accumulate(len(s.edits) for s in stored.run.schedule.steps))
    step = next((n for n, m in enumerate(made, 1) if m >= config.at), len(made))
    if step == len(made):
        edits = made[-1] if made else 0
        raise StoreError(f"{config.run} has {edits} edits, not more than {config.at}: choose a smaller --at, or a longer run")
    for name in stored.run.config.editor:
        pair = stored.at(name, step), stored.newest(name)[1]
        costs = (*_edit(stored, pair, config.edits), *_ask(stored, pair, made[step - 1], config.questions))
        yield [LateCost(name, made[step - 1], made[-1], *(median(c) if c else None for c in costs))]


def _edit(stored: StoredRun, pair: tuple[Editor, Editor], n: int) -> tuple[Milliseconds, Milliseconds]:
    """Both states make the next n edits of the stream in turn, and take turns in going first."""
    run, out = stored.run, ([], [])
    size, events = run.config.batch, run.stream.events(run.config.edits + n)[run.config.edits :]
    if not events:
        raise StoreError(f"the stream has no edits beyond the {run.config.edits} of the run: measure on a shorter one")
    for turn, at in enumerate(range(0, len(events), size)):
        part = [e for e in events[at : at + size] if e.kind != "retire"]
        for i in (0, 1) if turn % 2 else (1, 0):
            edit = partial(apply_edits, pair[i], run.stream, part, stored.n_steps + turn + 1)
            out[i].append(1000 * seconds_of(run.handle.device, edit)[0] / max(1, len(part)))
    return out


def _ask(stored: StoredRun, pair: tuple[Editor, Editor], upto: int, n: int) -> tuple[Milliseconds, Milliseconds]:
    """Both states answer n questions about edits that both have made in turn, after a first time that fills the caches.

    Answers differ: one that changed may be longer, and is scored in a pass of its own.
    """
    run, out = stored.run, ([], [])
    events = run.stream.events(run.config.edits)[max(0, upto - n) : upto]
    asks, answers = questions_about(run.handle, run.stream, events, n)
    for repetition in range(_REPETITIONS + 1 if asks else 0):
        for editor, costs in zip(pair, out):
            respond = partial(editor.predictor().respond, asks, answers, run.config.max_new_tokens)
            costs.extend([1000 * seconds_of(run.handle.device, respond)[0] / len(asks)] if repetition else [])
    return out
