"""SparseGPT (arXiv:2301.00774): mask and compensation in one left-to-right sweep over the columns.

A weight's score is w² / U_jj², the loss that removing it costs once the columns to its right have made up for it; the
mask is chosen one column block at a time (N:M: one group at a time), on weights that already carry all earlier updates.
Differs from the public code in one way: counts are exact (it thresholds with <= and drops one weight too many
per block).
Cost: 2/3 C³ for the factor, 2 R C² for the sweep; memory 2 C² + 3 R C floats.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from secateur.core.linalg import inverse_cholesky
from secateur.core.obs import obs_sweep
from secateur.core.pattern import NM, Block, Pattern, Stacked, keep_mask, parts_of
from secateur.core.solver import Needs, Pruned, apply_mask


@dataclass(frozen=True)
class SparseGPT:
    """Optimal-brain-surgeon pruning of one matrix."""

    needs: ClassVar[Needs] = "gram"

    damp: float = 0.01
    """Ridge added to H, as a fraction of mean(diag H). Larger = safer and less accurate."""
    column_block: int = 128
    """Columns whose mask is chosen together in unstructured patterns. Smaller = later, better informed decisions."""

    def __post_init__(self) -> None:
        if self.damp < 0 or self.column_block < 1:
            raise ValueError(f"damp must be >= 0 and column_block >= 1, got {self.damp} and {self.column_block}")

    def solve(self, W: Float[Tensor, "R C"], H: Float[Tensor, "..."], pattern: Pattern | Stacked) -> Pruned:
        U, note = inverse_cholesky(H, self.damp)
        unit = column_unit(pattern)
        block = max(1, self.column_block // unit) * unit
        every = unit if _is_nm(pattern) else block
        alive = W * (H.diagonal() > 0)  # a weight on an input that is always zero goes first, at no loss
        compensated, mask = obs_sweep(
            alive, U, lambda w, u, start: keep_mask(w.square() / u.square(), pattern, start), block, every
        )
        return apply_mask(compensated, mask, note)


def _is_nm(pattern: Pattern | Stacked) -> bool:
    return all(isinstance(part, NM) for part in parts_of(pattern))


def column_unit(pattern: Pattern | Stacked) -> int:
    """Columns that a decision may not cut apart: M of N:M, the width of a tile, else 1."""
    widths = [p.m if isinstance(p, NM) else p.cols if isinstance(p, Block) else 1 for p in parts_of(pattern)]
    return math.lcm(*widths)
