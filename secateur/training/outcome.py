"""What a sparse training starts from and comes to, in numbers, and what of that a user should be warned of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from secateur.training import shards
from secateur.training.loop import StepRecord
from secateur.training.optimizer import SparseAdamW
from secateur.training.shards import local

UNSETTLED = 1e-3
"""Share of a mask that changed at its last refresh, above which it is said to oscillate."""
STILL = ("fixed", "none")
"""Methods whose masks do not move."""


@dataclass(frozen=True)
class Outset:
    """The masters of a run before its first step."""

    pruned: float
    """Mean distance from zero of those that are pruned."""
    kept: float
    """The same of the others; 0 where nothing is trained sparse."""


@torch.no_grad()
def outset(optimizer: SparseAdamW) -> Outset:
    """Together."""
    sums = torch.zeros(2, 2, dtype=torch.float64)  # pruned and kept: of sizes, and how many
    for parameter, state in optimizer.state.items():
        if "mask" in state:
            sizes, keep = local(state["master"]).abs(), local(state["mask"])
            parts = [sizes[~keep], sizes[keep]]
            own = torch.stack(
                [torch.stack([part.sum().double(), part.new_tensor(part.numel()).double()]) for part in parts]
            )
            sums += shards.total(own, parameter).cpu()
    pruned, kept = (sums[:, 0] / sums[:, 1].clamp_min(1)).tolist()
    return Outset(pruned, kept)


def spacing(size: float, dtype: torch.dtype) -> float:
    """From a number of that size to the next one of its type."""
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(size)) if size > 0 else 0.0


def warnings(method: str, records: Sequence[StepRecord], start: Outset, dtype: torch.dtype, skipped: int) -> list[str]:
    """What went badly and what would help, a line each. ``dtype``: of what is saved."""
    flips, reach = records[-1].flip_rate, sum(record.lr for record in records)
    highest = max(record.lr for record in records)
    found = {
        f"{flips:.2%} of the masks changed at their last refresh: they had not settled; give more tokens, a larger c, "
        "or a smaller anneal": method not in STILL and flips > UNSETTLED,
        f"the rates of all steps add up to {reach:.2g}, and pruned weights were {start.pruned:.2g} away from zero on "
        "the average: the decay could not bring them there; give more tokens, a larger lr, or a pruned student": (
            method not in STILL and reach < start.pruned
        ),
        f"steps of {highest:.2g} are less than float32 resolves beside weights of {start.kept:.2g}: masters hardly "
        "moved; raise lr": highest < spacing(start.kept, torch.float32) / 2,
        f"the rates of all steps add up to {reach:.2g}, less than {str(dtype).removeprefix('torch.')} resolves beside "
        f"weights of {start.kept:.2g}: most of what was learnt was rounded away when it was saved; give more tokens, a "
        "larger lr, or dtype float32": reach < spacing(start.kept, dtype) / 2,
        f"{skipped} steps were left out, their gradients were not finite; lower lr": skipped > 0,
    }
    return [line for line, true in found.items() if true]
