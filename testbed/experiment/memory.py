"""Peak memory since it was last reset, so that an editor's peak is its own and not that of one that ran before it."""

from __future__ import annotations

import ctypes
import gc
import resource
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> bool:
    """Give free memory back to the system and begin to measure anew.

    Returns False where the system cannot reset its record (anything but Linux); `peak_bytes` is then that of the whole process.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        _RESET.write_text("5")  # sets the highest resident set to the present one: man 5 proc
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """Highest memory in bytes since `reset_peak`: the resident set on a CPU, what torch allocated on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
