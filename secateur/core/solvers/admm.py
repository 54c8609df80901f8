"""ADMM pruning (Bóza, TMLR 2024, arXiv:2401.02938): mask and weights by alternating projections.

Minimises tr((W - W0) H (W - W0)ᵀ) subject to W = Z, Z sparse: W solves a ridge problem whose matrix is factored once, Z
keeps the largest |W + U| in channel-normalised units, U sums the disagreement. The sparsity ramps up cubically over the
first iterations, then the mask is frozen and the iterations converge to the best weights under it.
On SmolLM2-135M at 70 % it closes a quarter of SparseGPT's log-perplexity gap to the dense model.

Differs from the public code: the ramp is really used for unstructured patterns (there it is computed and ignored).
Cost: C³ for the inverse + iterations * 2 R C²; memory 3 C² floats for the inverse, then C² + 6 R C.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.linalg import channel_norms, cholesky
from secateur.core.pattern import Pattern, Stacked, keep_mask, ramped
from secateur.core.solver import Needs, Pruned, apply_mask


@dataclass(frozen=True)
class ADMM:
    """Alternating directions between a ridge solve and the projection on the pattern."""

    needs: ClassVar[Needs] = "gram"

    iterations: int = 30
    """Ridge solves in all."""
    ramp: int = 20
    """Iterations in which the mask moves, its sparsity rising cubically to the target; at most ``iterations``."""
    rho: float = 1.0
    """Penalty on W - Z, in units of the normalised Gram matrix's unit diagonal."""
    damp: float = 0.1
    """Ridge towards the original weights, in the same units. Larger = closer to the original weights."""

    def __post_init__(self) -> None:
        if not 1 <= self.ramp <= self.iterations:
            raise ValueError(f"ramp must lie in 1..iterations, got {self.ramp} of {self.iterations}")
        if self.rho <= 0 or self.damp < 0:
            raise ValueError(f"rho must be > 0 and damp >= 0, got {self.rho} and {self.damp}")

    def solve(self, W: Float[Tensor, "R C"], H: Float[Tensor, "..."], pattern: Pattern | Stacked) -> Pruned:
        norms = channel_norms(H)
        total = W * norms  # W + U
        fixed, inverse, note = self._system(total, H, norms)
        mask, kept = torch.ones_like(W, dtype=torch.bool), torch.ones_like(W)
        for t in range(1, self.iterations + 1):
            if t <= self.ramp:
                mask = keep_mask(total.abs(), ramped(pattern, t / self.ramp))
                kept = mask.to(W.dtype)  # products with a float mask are several times faster than with a bool one
            Z = total * kept
            dual = total.sub_(Z)
            total = (Z.sub_(dual).mul_(self.rho).add_(fixed) @ inverse).add_(dual)
        return apply_mask(total.div_(norms), mask, note)

    def _system(
        self, W0: Float[Tensor, "R C"], H: Float[Tensor, "C C"], norms: Float[Tensor, " C"]
    ) -> tuple[Float[Tensor, "R C"], Float[Tensor, "C C"], str]:
        """The ridge solve, normalised: its right-hand side without the penalty, its inverse, the ladder's note."""
        G = torch.outer(norms, norms)
        torch.div(H, G, out=G)
        G.diagonal().fill_(1)  # of a dead channel too: cholesky's ridge is relative to the mean, and must be absolute
        fixed = (W0 @ G).add_(W0, alpha=self.damp)
        L, _, note = cholesky(G, self.damp + self.rho)
        del G  # a wide one is a good part of what a run holds
        return fixed, torch.cholesky_inverse(L), note
