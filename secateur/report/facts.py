"""Facts about a run that its report states: seconds of each stage, peak memory, versions."""

import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

from secateur.report.progress import Progress, Silent


class Stopwatch:
    """Wall seconds of named stages, in the order in which they ran, and who is told when one begins."""

    def __init__(self, progress: Progress | None = None) -> None:
        self.progress = progress or Silent()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, said: str = "") -> Iterator[None]:
        self.progress.stage(said or name)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 3)

    def spent(self) -> dict[str, Any]:
        """Seconds by stage up to now, and the most memory, as a report has them."""
        seconds = {"seconds": {**self.seconds, "total": self.total}}
        return {**seconds, "peak_memory_bytes": peak_memory(), "peak_gpu_memory_bytes": peak_gpu_memory()}

    @property
    def total(self) -> float:
        return round(sum(self.seconds.values()), 3)


def peak_memory() -> int:
    """Bytes: the most that this process has held in memory since it began (the kernel counts kB, macOS bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_gpu_memory() -> int | None:
    """Bytes: the most that tensors of this process have taken on the GPU; None where it used none."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None


def versions() -> dict[str, str]:
    """Whatever decides the bytes of a result."""
    packages = {name: version(name) for name in ("secateur", "torch", "transformers")}
    return packages | {"python": platform.python_version()}
