"""Speed and memory of an editor on a model: the tables `editors`, `paths` and `flops`.

Seconds are CPU seconds on a CPU, so that other processes do not count, and wall time on a GPU, unless a field says otherwise.
The reference implementation (`testbed.bench.reference`) is the method's own code with the whole model at every step, one edit
at a time, and nothing kept on the model between edits but the second moments of the corpus.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from streams.base import Stream
from testbed.bench.common import BenchConfig, Make, apply_edits, questions_about, seconds_of, stages_of
from testbed.bench.reference import recorded_losses, whole_model
from testbed.core.events import EditEvent
from testbed.core.schema import EditReport
from testbed.experiment.memory import peak_bytes, reset_peak
from testbed.model.handle import ModelHandle
from testbed.model.progress import bars


@dataclass(frozen=True)
class EditorSpeed:
    """One editor on one model."""

    model: str
    editor: str
    edits: int
    batch: int
    """Edits in one batch, at most as many as the editor takes."""
    failed: int
    edits_per_second: float
    reference_per_second: float | None
    """The same of the reference implementation; absent where it was left out."""
    prepare_seconds: float
    """Once, before the first edit."""
    edit_seconds: str
    """Wall seconds of all edits by stage."""
    probe_seconds_per_thousand: float
    """Scoring and generating the answers to a thousand questions after the edits, with their prompts tokenised before."""
    probe_seconds_per_thousand_first: float
    """The same with empty caches, so that prompts are tokenised and pictures decoded and encoded."""
    state_bytes_per_edit: float
    peak_bytes: int
    """Highest memory while this editor was measured."""

    @property
    def ratio(self) -> float | None:
        return self.edits_per_second / self.reference_per_second if self.reference_per_second else None


def measure_editor(handle: ModelHandle, stream: Stream, make: Make, config: BenchConfig) -> EditorSpeed:
    """Measure one editor on the stream's first events."""
    reset_peak(handle.device)
    events, editor = stream.events(config.edits), make()
    batch = min(config.batch or 1, editor.traits.max_batch or config.batch or 1)
    prepared, _ = seconds_of(handle.device, lambda: editor.prepare(handle, stream.train_pool()))
    reports: list[EditReport] = []
    stages: dict[str, float] = defaultdict(float)

    def edit() -> None:
        with bars() as progress:
            for step, at in enumerate(range(0, len(events), batch), 1):
                reports.append(apply_edits(editor, stream, events[at : at + batch], step))
                progress.advance(editor.name, min(at + batch, len(events)), len(events))

    seconds, _ = seconds_of(handle.device, edit)
    for stage, spent in (item for report in reports for item in stages_of(report).items()):
        stages[stage] += spent
    handle.cache.clear()
    asks, answers = questions_about(handle, stream, events, config.questions)
    respond = partial(editor.predictor().respond, asks, answers, 16)
    first_probe, probe = (seconds_of(handle.device, respond)[0] for _ in range(2))
    per_thousand = 1000 / max(1, len(asks))
    peak, singles = peak_bytes(handle.device), [[e] for e in events[: config.plain]]
    reference = apply_steps(handle, stream, make(), singles, reference=True) if singles else None
    return EditorSpeed(
        model=handle.name,
        editor=editor.name,
        edits=len(events),
        batch=batch,
        failed=sum(len(r.failed) for r in reports),
        edits_per_second=len(events) / seconds,
        reference_per_second=len(singles) / sum(reference.seconds) if reference else None,
        prepare_seconds=prepared,
        edit_seconds=", ".join(f"{stage} {s:.2f}" for stage, s in stages.items()) or f"{seconds:.2f}",
        probe_seconds_per_thousand=per_thousand * probe,
        probe_seconds_per_thousand_first=per_thousand * first_probe,
        state_bytes_per_edit=(reports[-1].state_bytes if reports else 0) / max(1, len(events)),
        peak_bytes=peak,
    )


@dataclass(frozen=True)
class AppliedSteps:
    """Seconds of each step, the losses (B,) of its training steps, and the number of failed edits of all steps."""

    sizes: list[int]
    seconds: list[float]
    losses: list[list[Tensor]]
    failed: int

    @property
    def edits_per_second(self) -> float:
        """Without the first step (where there are more), which checks the model's layout and computes second moments."""
        first = min(1, len(self.sizes) - 1)
        return sum(self.sizes[first:]) / sum(self.seconds[first:])


def apply_steps(
    handle: ModelHandle, stream: Stream, editor: Any, steps: Sequence[Sequence[EditEvent]], reference: bool = False
) -> AppliedSteps:
    """Make the edits of each step in one batch, with the reference implementation or as the run does."""
    editor.prepare(handle, stream.train_pool())
    forget(handle)
    seconds, losses, failed = [], [], 0
    for n, events in enumerate(steps, 1):
        if reference:
            forget(handle)
        with whole_model(handle) if reference else nullcontext(), recorded_losses() as seen:
            spent, report = seconds_of(handle.device, partial(apply_edits, editor, stream, events, n))
        seconds.append(spent)
        losses.append(list(seen))
        failed += len(report.failed)
    return AppliedSteps([len(s) for s in steps], seconds, losses, failed)


def forget(handle: ModelHandle) -> None:
    """Drop what is kept on the model but the second moments of the corpus, which are computed once for all that is compared."""
    moments = {k: v for k, v in handle.cache.items() if k == "second moments"}
    handle.cache.clear()
    handle.cache.update(moments)


@dataclass(frozen=True)
class MethodSpeed:
    """One method beside its reference implementation on the same first edits, in edits a second."""

    model: str
    editor: str
    failed: int
    reference_per_second: float
    single_per_second: float
    """One edit at a time."""
    batch_per_second: float | None
    """`batch` edits at once; absent where the method takes fewer."""
    batch: int
    loss_difference: float | None
    """Largest difference of a training loss between the reference implementation and single edits; absent without losses."""
    batch_loss_difference: float | None
    """The same for batches; absent where the edits of a batch are trained jointly."""

    @property
    def ratio(self) -> float:
        return self.single_per_second / self.reference_per_second

    @property
    def batch_ratio(self) -> float | None:
        return self.batch_per_second / self.reference_per_second if self.batch_per_second else None


def measure_paths(handle: ModelHandle, stream: Stream, make: Make, config: BenchConfig) -> MethodSpeed:
    """Measure one method on the stream's first new facts: at most 4 by the reference, 4 times as many singly, 2 batches."""
    edits, batch = min(4, config.edits), config.batch or 16
    events, editor = [e for e in stream.events(8 * max(edits, batch)) if e.kind == "add"], make()
    slow = apply_steps(handle, stream, make(), [[e] for e in events[:edits]], reference=True)
    single = apply_steps(handle, stream, make(), [[e] for e in events[: 4 * edits]])
    takes_batch = editor.traits.max_batch is None or editor.traits.max_batch >= batch
    together = apply_steps(handle, stream, make(), [events[:batch], events[batch : 2 * batch]]) if takes_batch else None
    separable = editor.traits.gated and editor.traits.undo  # an edit that can be undone alone was trained alone
    return MethodSpeed(
        model=handle.name,
        editor=editor.name,
        failed=slow.failed + single.failed + (together.failed if together else 0),
        reference_per_second=slow.edits_per_second,
        single_per_second=single.edits_per_second,
        batch_per_second=together.edits_per_second if together else None,
        batch=batch,
        loss_difference=largest_difference(slow.losses, single.losses),
        batch_loss_difference=largest_difference(slow.losses, _by_edit(together.losses, batch)) if together and separable else None,
    )


def _by_edit(losses: list[list[Tensor]], batch: int) -> list[list[Tensor]]:
    return [[x[i : i + 1] for x in seen] for seen in losses for i in range(batch) if seen and i < len(seen[0])]


def largest_difference(one: list[list[Tensor]], other: list[list[Tensor]]) -> float | None:
    """The largest difference of a loss over the edits and training steps that both have; None where there are none."""
    pairs = [(a, b) for losses, also in zip(one, other) for a, b in zip(losses, also)]
    return max((float((a.float() - b.float()).abs().max()) for a, b in pairs), default=None)


@dataclass(frozen=True)
class FlopShare:
    """Wall time and FLOPs of an edit and of a question, after the first edit has filled the caches."""

    model: str
    editor: str
    unit: str
    """`edit` or `question`."""
    milliseconds: float
    """Wall time of one edit or question."""
    gigaflops: float
    """Billions of floating-point operations in matrix products, by torch's formulas; factorisations are not counted."""
    share_of_peak: float
    """gigaflops by wall time, as a share of the rate of one large matrix product in the model's dtype on this device."""


def measure_flops(handle: ModelHandle, stream: Stream, make: Make, config: BenchConfig) -> list[FlopShare]:
    """Measure one editor twice, each time fresh and with empty caches: once timed, and once with FLOPs counted."""
    first, *events = stream.events(config.edits + 1)
    asks, answers = questions_about(handle, stream, events, config.questions)
    peak, numbers = peak_rate(handle.device, handle.head.weight.dtype), {"edit": len(events), "question": len(asks)}

    def by_unit(measure: Callable[[Callable[[], object]], float]) -> dict[str, float]:
        handle.cache.clear()
        editor = make()
        editor.prepare(handle, stream.train_pool())
        apply_edits(editor, stream, [first], 1)
        edit = measure(lambda: [apply_edits(editor, stream, [e], step) for step, e in enumerate(events, 2)])
        respond = partial(editor.predictor().respond, asks, answers, 16)
        respond()
        return {"edit": edit, "question": measure(respond)}

    seconds, flops = by_unit(lambda work: seconds_of(handle.device, work, wall=True)[0]), by_unit(count_flops)
    return [
        FlopShare(handle.name, make().name, unit, 1e3 * seconds[unit] / n, flops[unit] / n / 1e9, flops[unit] / seconds[unit] / peak)
        for unit, n in numbers.items()
        if n
    ]


def count_flops(work: Callable[[], object]) -> float:
    """FLOPs of the matrix products by torch's formulas."""
    with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
        work()
    return counter.get_total_flops()


@cache
def peak_rate(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """FLOPs a second of one large matrix product; the median of as many as take these seconds."""
    n = 2048 if device.type == "cpu" else 8192
    timer = Timer("a @ a", globals={"a": torch.ones(n, n, device=device, dtype=dtype)}, num_threads=torch.get_num_threads())
    return 2 * n**3 / timer.blocked_autorange(min_run_time=seconds).median


_aten: Any = torch.ops.aten
_FORMULAS: dict[Any, Callable[..., float]] = {
    # absent from torch's table: attention on a CPU, and products in place; arguments are shapes
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    _aten.addmm_: lambda c, a, b, *_, **__: 2 * prod(a) * b[-1],
}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # the head's product in `testbed.model.answer_loss`
    _FORMULAS[torch.ops.mkldnn._linear_pointwise] = lambda x, weight, *_, **__: 2 * prod(x) * weight[0]
