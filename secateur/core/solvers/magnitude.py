"""Magnitude pruning: keep the largest |w|. No data, no compensation; the baseline everyone beats."""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from secateur.core.pattern import Pattern, Stacked, keep_mask
from secateur.core.solver import Needs, Pruned, apply_mask


@dataclass(frozen=True)
class Magnitude:
    """Score |w|; the kept weights are not changed."""

    needs: ClassVar[Needs] = "nothing"

    def solve(self, W: Float[Tensor, "R C"], H: Float[Tensor, "..."], pattern: Pattern | Stacked) -> Pruned:
        return apply_mask(W, keep_mask(W.abs(), pattern))
