# pyright: strict
"""Threads of a process on a machine that others use too. Call `prepare` before torch is loaded: OpenMP reads its settings then.

An OpenMP thread that waits spins by default; on a machine with fewer free cores than threads, the spinning takes the time of
those that work (30 edits on two cores beside two other runs: 25 CPU seconds with a passive policy, over 300 without).
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

_STAT, _SECONDS = Path("/proc/stat"), 0.3
"""Where Linux counts what cores do, and how long they are watched."""


def has_gpu() -> bool:
    """Whether the machine has a device that a model goes to by itself, told without torch: an NVIDIA GPU, or Apple's."""
    return Path("/dev/nvidia0").exists() or sys.platform == "darwin"


def processes(most: int) -> int:
    """How many processes have a free core each, at most `most`; 1 where torch is loaded, as in a notebook."""
    if "torch" in sys.modules:
        return 1
    cores, load = free_cores()
    return max(1, min(most, round(cores - load)))


def prepare(threads: int | None = None, processes: int = 1) -> str:
    """Let waiting threads sleep, and take as many threads as there are free cores, unless the user's environment says otherwise.

    Does nothing where torch is loaded, as in a notebook, because it would be too late.

    threads: this number instead, for a run that goes on, because rounding depends on it. processes: how many share the cores.
    Returns a line for the user; empty where all cores are used or `OMP_NUM_THREADS` was set before.
    """
    if "torch" in sys.modules:
        return ""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "OMP_NUM_THREADS" in os.environ:
        return ""
    cores, load = free_cores()
    chosen = threads or max(1, min(cores, round(cores - load)) // processes)
    os.environ["OMP_NUM_THREADS"] = str(chosen)
    if threads:
        return f"threads: {threads}, as when the run began"
    busy = chosen * processes < cores
    return f"threads: {chosen} of {cores}, because {load:.1f} are busy (OMP_NUM_THREADS chooses)" if busy else ""


def free_cores() -> tuple[int, float]:
    """(cores that this process may use, cores that are busy now; where /proc/stat does not tell, the load of the last minute).

    The load of the last minute alone would count an installation that has just ended.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not _STAT.is_file():
        return cores, os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    (idle, total), _ = _times(), time.sleep(_SECONDS)
    later_idle, later_total = _times()
    return cores, (os.cpu_count() or 1) * (1 - (later_idle - idle) / max(1, later_total - total))


def _times() -> tuple[int, int]:
    """(ticks in which cores had nothing to do, all ticks) since the machine began."""
    ticks = [int(n) for n in _STAT.read_text().split("\n", 1)[0].split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)
