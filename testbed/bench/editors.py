"""One editor on one model: edits a second beside its plain path, where the seconds go, what a probe costs, what is kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from streams.base import Stream
from testbed.bench.paths import clock_of, run_steps
from testbed.core.events import Ask, EditBatch, EditEvent
from testbed.core.schema import EditReport
from testbed.core.timing import NOTE_PREFIX
from testbed.editors.base import Editor
from testbed.experiment.loop import peak_bytes
from testbed.model.handle import ModelHandle
from testbed.model.predictor import Predictor
from testbed.model.progress import bars


@dataclass(frozen=True)
class Line:
    """One editor on one model. Seconds are CPU seconds on a CPU, in which neighbours do not count, else wall
    time to the end of all work; `edit_seconds` is wall time everywhere."""

    model: str
    editor: str
    edits: int
    batch: int
    """Edits made at once; the plain path makes one."""
    failed: int
    edits_per_second: float
    plain_per_second: float | None
    """The same method's plain path; absent where it was left out."""
    prepare_seconds: float
    """Once, before the first edit."""
    edit_seconds: str
    """Seconds of all edits by stage; what no stage names is left out."""
    probe_seconds_per_thousand: float
    """A thousand questions scored and generated, after the edits, prompts already tokenised once."""
    probe_seconds_per_thousand_first: float
    """The same with nothing cached: tokenising, decoding and seeing each picture for the first time."""
    state_bytes_per_edit: float
    peak_bytes: int
    """Largest memory so far: of the process on a CPU, of this line on a GPU."""

    @property
    def ratio(self) -> float | None:
        return self.edits_per_second / self.plain_per_second if self.plain_per_second else None


@dataclass(frozen=True)
class Amount:
    """How much is measured: edits made, edits on the plain path (0 leaves it out), questions asked; edits made at once."""

    edits: int
    plain: int
    questions: int
    batch: int = 1


def line(handle: ModelHandle, stream: Stream, make: Callable[[], Editor], amount: Amount) -> Line:
    """Measure one editor on the stream's first events; one that takes fewer at once than asked gets as many as it takes."""
    if handle.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(handle.device)
    events = stream.events(amount.edits)
    editor = make()
    batch = min(amount.batch, editor.traits.max_batch or amount.batch)
    prepared = seconds_of(handle, lambda: editor.prepare(handle, stream.train_pool()))
    stages, failed, report = Counter[str](), 0, None
    clock = clock_of(handle)
    start = clock()
    with bars() as progress:
        for step, at in enumerate(range(0, len(events), batch), 1):
            some = events[at : at + batch]
            report = editor.apply(EditBatch(tuple(some), step, {e.id: stream.paraphrases(e) for e in some}))
            stages.update(stages_of(report))
            failed += len(report.failed)
            progress.advance(editor.name, at + len(some), len(events))
    _wait(handle)
    seconds = clock() - start
    handle.cache.clear()
    first, again = (_per_thousand(handle, editor.predictor(), *asked(handle, stream, events, amount.questions)) for _ in range(2))
    state, peak = (report.state_bytes if report else 0) / max(1, len(events)), peak_bytes(handle.device)
    plain = _plainly(handle, stream, make, events[: amount.plain])
    told = ", ".join(f"{k} {v:.2f}" for k, v in stages.items()) or f"{seconds:.2f}"
    rate = len(events) / seconds
    return Line(handle.name, editor.name, len(events), batch, failed, rate, plain, prepared, told, again, first, state, peak)


def _plainly(handle: ModelHandle, stream: Stream, make: Callable[[], Editor], events: Sequence[EditEvent]) -> float | None:
    return run_steps(handle, stream, make(), [[e] for e in events], whole=True)[0] if events else None


def stages_of(report: EditReport) -> dict[str, float]:
    """Seconds of a batch by stage."""
    return {k.removeprefix(NOTE_PREFIX): v for k, v in report.notes.items() if k.startswith(NOTE_PREFIX)}


def asked(handle: ModelHandle, stream: Stream, events: Sequence[EditEvent], n: int) -> tuple[list[Ask], list[str | None]]:
    """Questions about the edits that the model can read, and their answers."""
    found = [q for e in events for q in stream.questions(e) if (q.image is not None) == handle.reads_pictures][:n]
    return [q.ask() for q in found], [q.answer for q in found]


def _per_thousand(handle: ModelHandle, predictor: Predictor, asks: list[Ask], answers: list[str | None]) -> float:
    return 1000 * seconds_of(handle, lambda: predictor.respond(asks, answers, 16)) / max(1, len(asks))


def seconds_of(handle: ModelHandle, work: Callable[[], object]) -> float:
    """CPU seconds on a CPU, else wall time to the end of all work."""
    clock = clock_of(handle)
    start = clock()
    work()
    _wait(handle)
    return clock() - start


def _wait(handle: ModelHandle) -> None:
    """Until the GPU has done what it was given."""
    if handle.device.type == "cuda":
        torch.cuda.synchronize(handle.device)
