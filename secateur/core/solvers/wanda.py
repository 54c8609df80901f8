"""Wanda (arXiv:2306.11695): score a weight by |w| times the norm of its input channel. No compensation.

The published method compares weights inside each output row; that is the pattern ``Unstructured(s, per="row")`` here
and a choice of the user's, since the score does not depend on it. Memory: C floats per linear. Time: one pass over
the weights.
"""

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from secateur.core.pattern import Pattern, Stacked, keep_mask
from secateur.core.solver import Needs, Pruned, apply_mask


@dataclass(frozen=True)
class Wanda:
    """Score |w_ij| ||x_j||₂ (eq. 1 of the paper); the kept weights are not changed."""

    needs: ClassVar[Needs] = "diag"

    def solve(self, W: Float[Tensor, "R C"], H: Float[Tensor, "..."], pattern: Pattern | Stacked) -> Pruned:
        diagonal = H.diagonal() if H.ndim == 2 else H
        return apply_mask(W, keep_mask(W.abs() * diagonal.sqrt(), pattern))
