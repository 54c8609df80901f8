"""The low-rank branches of a saved directory, held to what was promised of them.

Broken means: a promised branch is missing or has another rank, one is there that nobody promised, a factor is not
finite, or a branch does not fit the weight that it stands beside.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from secateur.core.low_rank import Branch
from secateur.core.pattern import VALUE_BITS
from secateur.models.branches import FOLDER, Branches, load_branches

Shape = tuple[int, int]


@dataclass(frozen=True)
class LowRank:
    """What the branches of a directory take."""

    branches: int
    numbers: int
    bytes: int
    share: float
    """Of the weights that survive in the pruned matrices (in all matrices where nothing was promised)."""
    bits_per_weight: float
    """That they add to every weight of these matrices, 16 bit a number."""


def read_branches(directory: Path, factors: Mapping[str, Tensor] | None = None) -> Branches:
    """None in most directories. ArtefactError where there are some and they are damaged."""
    return load_branches(directory / FOLDER, factors) if (directory / FOLDER).is_dir() else {}


def cost_of(branches: Mapping[str, Branch], weights: int, zeros: int) -> LowRank | None:
    """What they take beside so many weights, of which so many are zero."""
    if not branches:
        return None
    factors = [factor for branch in branches.values() for factor in branch]
    numbers, size = sum(f.numel() for f in factors), sum(f.numel() * f.element_size() for f in factors)
    share, bits = numbers / max(weights - zeros, 1), VALUE_BITS * numbers / max(weights, 1)
    return LowRank(len(branches), numbers, size, share, bits)


def broken_branches(
    branches: Mapping[str, Branch], promised: Mapping[str, int] | None, shapes: Mapping[str, Shape]
) -> Iterator[str]:
    """A line for each broken promise. ``shapes``: of the stored matrices by name, transposed ones as stored."""
    for name, rank in (promised or {}).items():
        if name not in branches:
            yield f"{name}: a branch of rank {rank} was promised, none is stored"
    for name, branch in branches.items():
        rank, (R, C) = branch.X.shape[0], (branch.S.shape[0], branch.X.shape[1])
        if promised is not None and promised.get(name) != rank:
            wanted = f"rank {promised[name]}" if name in promised else "none"
            yield f"{name}: a branch of rank {rank} is stored, {wanted} was promised"
        shape = shapes.get(f"{name}.weight")
        if shape not in ((R, C), (C, R)):
            yield f"{name}: its branch is for a weight of {(R, C)}, stored is {shape}"
        if bad := sum(factor.numel() - int(factor.isfinite().sum()) for factor in branch):
            yield f"{name}: {bad} of {branch.size} values of its branch are not finite"
