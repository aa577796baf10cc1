"""Benchmarks from local files (`--benchmarks`): abilities, safety and pictures, in addition to the stream's own questions."""

from __future__ import annotations

from testbed.core.registry import PROBES
from testbed.probes.base import Checkpoint, EditHistory, Planned, Probe


@PROBES.register("benchmarks")
class BenchmarkPanel(Probe):
    """A fixed sample of each benchmark, the same at every full checkpoint and for every seed."""

    summary = "benchmarks of --benchmarks: choices, generations, refusals, questions about pictures"
    version = 1

    def ask(self, history: EditHistory, checkpoint: Checkpoint) -> list[Planned]:
        if not checkpoint.full:
            return []
        out = []
        for benchmark in history.benchmarks:
            asked = benchmark.questions[: history.size(len(benchmark.questions))]
            out += [Planned(q, "benchmark", None, len(asked) / benchmark.size) for q in asked]
        return out
