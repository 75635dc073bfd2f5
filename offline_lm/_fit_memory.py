"""Peak memory of each stage of `fit`."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESETS = os.access(_CLEAR, os.W_OK)


class Peaks:
    """Peak memory by stage, in GB of 2**30 bytes, as metrics.

    `peak_memory_STAGE_gb` is the most that the process held resident, pages of memory-mapped files included, which the
    system takes back when it needs them; `peak_memory_gb` is that of all stages. On CUDA,
    `peak_device_memory_STAGE_gb` is the most that torch had allocated there. Only Linux lets a peak begin anew:
    elsewhere a stage's figure covers the stages before it, too.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.metrics = device, {"peak_memory_gb": 0.0}

    def __str__(self) -> str:
        stages = [(k[12:-3], v) for k, v in self.metrics.items() if k.startswith("peak_memory_") and k[12:] != "gb"]
        told = ", ".join(f"{name} {gb:.2f}" for name, gb in stages)
        return f"peak memory {self.metrics['peak_memory_gb']:.2f} GB ({told})"

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if _RESETS:
            _CLEAR.write_text("5")  # proc(5): the peak resident set is again what it is now
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        yield
        peak = _peak() / 2**30
        self.metrics[f"peak_memory_{name}_gb"] = peak
        self.metrics["peak_memory_gb"] = max(peak, self.metrics["peak_memory_gb"])
        if self.device.type == "cuda":
            self.metrics[f"peak_device_memory_{name}_gb"] = torch.cuda.max_memory_allocated(self.device) / 2**30


def _peak() -> int:
    """The peak resident set, in bytes."""
    if _RESETS:
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
