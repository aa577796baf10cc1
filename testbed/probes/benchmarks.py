"""Benchmarks from local files (`--benchmarks`): abilities, safety, pictures, beside what the stream itself asks."""

from __future__ import annotations

from testbed.core.registry import PROBES
from testbed.probes.base import Moment, Past, Planned, Probe


@PROBES.register("benchmarks")
class Benchmarks(Probe):
    """A fixed sample of each benchmark, the same at every full moment and for every seed."""

    summary = "benchmarks of --benchmarks: choices, generations, refusals, questions about pictures"
    version = 1

    def ask(self, past: Past, moment: Moment) -> list[Planned]:
        if not moment.full:
            return []
        out = []
        for benchmark in past.benchmarks:
            asked = benchmark.questions[: past.size(len(benchmark.questions))]
            out += [Planned(q, "benchmark", None, len(asked) / benchmark.size) for q in asked]
        return out
