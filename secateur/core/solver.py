"""The protocol every layer solver follows, and the one ruler that measures them all.

A layer solver answers one question: which weights of this matrix may go, and what should the others become, so that
its output on the calibration inputs changes least? It is a frozen dataclass of hyperparameters and pure: arguments are
not modified, nothing is printed, nothing moves between devices.

R = out_features, C = in_features. H = XᵀX / tokens (C x C), or its diagonal for solvers that need no more.
"""

from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.grid import Grid
from secateur.core.pattern import Pattern, Stacked

Needs = Literal["gram", "diag", "nothing"]


class Pruned(NamedTuple):
    """A pruned matrix: weights with exact +0.0 where the mask is False."""

    W: Float[Tensor, "R C"]
    mask: Bool[Tensor, "R C"]
    note: str = ""
    """What a reader of the report must know (damping raised, say); empty when all went as asked."""
    grid: Grid | None = None
    """Scales and zero points of weights that are quantized; W holds the values that their codes stand for."""


@runtime_checkable
class LayerSolver(Protocol):
    """One pruning method for one matrix (or several stacked ones that share their input)."""

    needs: ClassVar[Needs]
    """Which moments of the inputs ``solve`` gets as H: the Gram matrix, its diagonal, or a diagonal it ignores."""

    def solve(self, W: Float[Tensor, "R C"], H: Float[Tensor, "..."], pattern: Pattern | Stacked) -> Pruned: ...


def apply_mask(W: Float[Tensor, "R C"], mask: Bool[Tensor, "R C"], note: str = "") -> Pruned:
    """Weights under a mask; a pruned weight becomes +0.0, never -0.0 (which some consumers do not count as zero)."""
    return Pruned(torch.where(mask, W, torch.zeros((), dtype=W.dtype, device=W.device)), mask, note)


def relative_error(W0: Float[Tensor, "R C"], W: Float[Tensor, "R C"], H: Float[Tensor, "..."]) -> float:
    """Share of a linear's output energy that the change destroys: tr(D H Dᵀ) / tr(W0 H W0ᵀ) with D = W - W0.

    H is the Gram matrix (C x C) or its diagonal (C), which ignores correlations. 0 is perfect, 1 is as bad as removing
    the whole matrix. An all-zero output (nothing to lose) gives 0.
    """

    def energy(M: Tensor) -> Tensor:
        return ((M @ H) * M).sum() if H.ndim == 2 else (M.square() * H).sum()

    total = energy(W0)
    return float(energy(W - W0) / total) if total > 0 else 0.0
