"""Bytes of a whole run: the peaks of host, device and disk, and what the result takes, however it is stored."""

from typing import Any

import psutil

from secateur.config import PruneConfig
from secateur.core.pattern import VALUE_BITS
from secateur.core.plan import Plan
from secateur.planning.footprint import Footprint, footprint
from secateur.planning.shapes import BlockShape, Run
from secateur.planning.subject import Subject
from secateur.report.runtimes import alternatives
from secateur.report.stored_page import MASKED

BRANCHED = "mask, 16 bit values, branches"


def memory(
    subject: Subject, config: PruneConfig, plan: Plan, shapes: list[BlockShape], run: Run
) -> dict[str, dict[str, float]]:
    """Peaks of host, device and disk, where the result goes to a directory.

    What this process holds now stands for interpreter and libraries of the run. A block is counted apart from the model
    where it is elsewhere: on a device, or brought from disk. Until the result is complete the disk holds the finished
    blocks, the hidden states twice while those of the next block replace them, and what finds no room in memory.
    """
    work = fullest(subject, config, shapes, run).to_dict()
    waiting, state = work.pop("hidden"), work.pop("state")
    kept = min(waiting, config.hidden_memory * 1e9)
    lazy, on_host = subject.on_disk(config.offload), config.device == "cpu"
    loaded = {
        "interpreter": float(psutil.Process().memory_info().rss),
        "outside the blocks" if lazy else "model": float(subject.outside_blocks if lazy else subject.bytes),
    }
    near = {name: size for name, size in work.items() if name != "block" or lazy} if on_host else {}
    branches = branch_numbers(plan, config.low_rank) * subject.dtype.itemsize
    disk = {
        "model": float(subject.bytes + branches),
        "finished blocks": float(plan.size * subject.dtype.itemsize + branches),
        "hidden states": 2 * state,
        "spilled": waiting - kept,
    }
    return {
        "host": with_peak({**loaded, "hidden": kept, **near}, sum(loaded.values()) + subject.unpacking),
        "device": with_peak({} if on_host else work),
        "disk": with_peak(disk),
    }


def fullest(subject: Subject, config: PruneConfig, shapes: list[BlockShape], run: Run) -> Footprint:
    """Of the planned block that takes most."""
    itemsize, planned = subject.dtype.itemsize, (shape for shape in shapes if shape.planned)
    footprints = (footprint(shape, config.method, run, itemsize, config.low_rank) for shape in planned)
    return max(footprints, key=lambda f: f.hidden + f.work)


def with_peak(parts: dict[str, float], least: float = 0) -> dict[str, float]:
    return {**parts, "peak": max(sum(parts.values()), least)}


def result(subject: Subject, plan: Plan, config: PruneConfig) -> dict[str, Any]:
    """Sizes: as saved (zeros stored), as a mask and 16-bit values, and what dense formats would take."""
    bits, weights = plan.bits_per_weight, plan.size
    storages = {"saved, zeros stored": 8.0 * subject.dtype.itemsize, MASKED: bits, **alternatives(plan.inputs)}
    numbers = branch_numbers(plan, config.low_rank)
    if numbers:
        storages[BRANCHED] = bits + VALUE_BITS * numbers / weights
    rest = (subject.parameters - weights) * 2
    sizes = {name: rest + weights * per / 8 for name, per in storages.items()}
    return {
        "bits_per_weight": storages,
        "bytes": sizes | {"saved, zeros stored": subject.bytes + numbers * subject.dtype.itemsize},
    }


def branch_numbers(plan: Plan, rank: int) -> int:
    """In the factors of all branches."""
    return sum(rank * sum(target.shape) for target in plan.values())
