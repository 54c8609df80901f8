"""Exporting from Python: ``export_to`` and ``unpack``, behind the two verbs, and what they tell.

    told = export_to("pruned", "sparse-safetensors", "packed")
    told["share"], told["bits_per_weight"]
    unpack("packed", "again")             # the bytes of "pruned"

A share says nothing by itself: the same weights could have been quantized instead. What that takes stands beside it.
"""

import os
from pathlib import Path
from typing import Any

from secateur.export.directory import unpack_directory
from secateur.export.sizes import Sizes
from secateur.export.targets import target_named
from secateur.report.facts import Stopwatch
from secateur.report.progress import Progress
from secateur.report.runtimes import ALTERNATIVES
from secateur.report.tables import size

Path_ = str | os.PathLike[str]


def export_to(directory: Path_, target: str, out: Path_, *, progress: Progress | None = None) -> dict[str, Any]:
    """Write `directory` as `target` to `out`, a directory that does not exist yet, and read it back.

    UsageError for an unknown target or an occupied `out`; ArtefactError for a directory that is not sound.
    """
    watch = Stopwatch(progress)
    sizes = target_named(target)(Path(directory), Path(out), watch)
    others = alternatives(sizes)
    return {
        "target": target,
        "source": os.fspath(directory),
        "out": os.fspath(out),
        **sizes.to_dict(),
        "alternatives": others,
        "warnings": warnings(sizes, others),
        "seconds": watch.seconds,
        "bytes_per_second": {name: _rate(sizes.dense_bytes, spent) for name, spent in watch.seconds.items()},
    }


def unpack(directory: Path_, out: Path_, *, progress: Progress | None = None) -> dict[str, Any]:
    """Write the dense directory that was packed, byte for byte, to `out`, a directory that does not exist yet.

    UsageError for an occupied `out`; ArtefactError for a damaged directory, or one from a later version.
    """
    watch = Stopwatch(progress)
    count = unpack_directory(Path(directory), Path(out), watch)
    rate = _rate(count, watch.total)
    return {
        "source": os.fspath(directory),
        "out": os.fspath(out),
        "bytes": count,
        "seconds": watch.seconds,
        "bytes_per_second": rate,
    }


def _rate(count: int, spent: float) -> float | None:
    return count / spent if spent else None


def alternatives(sizes: Sizes) -> dict[str, float]:
    """Bytes of the whole model by what else could become of the pruned matrices; the rest at 16 bit, as in a plan.

    None of a quantized model: how many weights its codes are is for ``inspect`` to say, of what was packed.
    """
    if sizes.codes.tensors:
        return {}
    rest = (sizes.whole.elements - sizes.sparse.elements) * 2
    return {name: rest + sizes.sparse.elements * bits / 8 for name, bits in ALTERNATIVES.items()}


def warnings(sizes: Sizes, others: dict[str, float]) -> list[str]:
    """What makes the result a poor bargain."""
    if not sizes.sparse.tensors and not sizes.codes.tensors:
        return ["no floating-point matrix is sparse: what was saved is compression of dense numbers, prune first"]
    smaller = [f"{name} {size(count)}" for name, count in others.items() if count < sizes.packed_bytes]
    if not smaller:
        return []
    return [f"smaller than these {size(sizes.packed_bytes)} without any zeros: {', '.join(smaller)}"]
