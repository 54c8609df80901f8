"""Round to nearest, GPTQ, and pruning and quantization in one pass: three layer solvers that never revive a zero.

All choose among the values of a ``core.grid.Grid``. RTN looks at the weights alone. GPTQ (arXiv:2210.17323) rounds
column by column and lets the columns to the right make up for it; a weight that was zero stays zero and makes up for
nothing. Joint (SparseGPT, arXiv:2301.00774, section 3.5) also decides in that same sweep which weights go, so that
what is kept makes up for pruning and rounding together, with one factorisation for both.

Differs from the public code: the zeros of the input are kept (there GPTQ's updates revive them); scales are those of
least rounding error, found on the weights as the sweep has left them when it comes to their group, and only of the
weights that stay; columns are visited from left to right always, without act-order, because groups are columns side by
side and N:M groups are too.

Cost of GPTQ and Joint: as SparseGPT, plus 13 roundings for the scales. R = out_features, C = in_features.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.grid import Grid, RoundColumn, Scheme, column_rounder, fit_grid, on_grid
from secateur.core.linalg import inverse_cholesky
from secateur.core.obs import ChooseMask, obs_sweep
from secateur.core.pattern import NM, Pattern, Stacked, keep_mask, parts_of
from secateur.core.solver import Needs, Pruned, apply_mask
from secateur.core.solvers.sparsegpt import column_unit


def _check_damp(damp: float) -> None:
    if damp < 0:
        raise ValueError(f"damp must be >= 0, got {damp}")


@dataclass(frozen=True)
class RTN:
    """Every weight to its nearest value; no data, no compensation."""

    needs: ClassVar[Needs] = "nothing"

    scheme: Scheme
    """Bits, groups, symmetry."""

    def solve(self, W: Float[Tensor, "R C"], H: Float[Tensor, "..."], pattern: Pattern | Stacked) -> Pruned:
        grid = fit_grid(W, self.scheme)
        return _on_grid(on_grid(W, grid, self.scheme), W != 0, grid)


@dataclass(frozen=True)
class GPTQ:
    """Rounding with compensation; the zeros of W stay, whatever the pattern says."""

    needs: ClassVar[Needs] = "gram"

    scheme: Scheme
    """Bits, groups, symmetry."""
    damp: float = 0.01
    """Ridge added to H, as a fraction of mean(diag H). Larger = safer and less accurate."""

    def __post_init__(self) -> None:
        _check_damp(self.damp)

    def solve(self, W: Float[Tensor, "R C"], H: Float[Tensor, "..."], pattern: Pattern | Stacked) -> Pruned:
        kept = W != 0

        def choose(w: Tensor, u: Tensor, start: int) -> Tensor:
            return kept[:, start : start + w.shape[1]]

        return _sweep(W, H, self.scheme, self.damp, choose, unit=1, every=W.shape[1])


@dataclass(frozen=True)
class Joint:
    """SparseGPT and GPTQ in one sweep; the zeros that W has already are the first to go."""

    needs: ClassVar[Needs] = "gram"

    scheme: Scheme
    """Bits, groups, symmetry."""
    damp: float = 0.01
    """Ridge added to H, as a fraction of mean(diag H). Larger = safer and less accurate."""

    def __post_init__(self) -> None:
        _check_damp(self.damp)

    def solve(self, W: Float[Tensor, "R C"], H: Float[Tensor, "..."], pattern: Pattern | Stacked) -> Pruned:
        W = W * (H.diagonal() > 0)  # a weight on an input that is always zero goes first, at no loss
        alive = W != 0

        def choose(w: Tensor, u: Tensor, start: int) -> Tensor:
            here = alive[:, start : start + w.shape[1]]
            return keep_mask(w.square() / u.square() * here, pattern, start) & here

        unit = column_unit(pattern)
        every = unit if all(isinstance(part, NM) for part in parts_of(pattern)) else W.shape[1]
        return _sweep(W, H, self.scheme, self.damp, choose, unit, every)


Quantizer = RTN | GPTQ | Joint
QUANTIZERS: dict[str, type[Quantizer]] = {"rtn": RTN, "gptq": GPTQ, "joint": Joint}


def _sweep(
    W: Float[Tensor, "R C"],
    H: Float[Tensor, "C C"],
    scheme: Scheme,
    damp: float,
    choose: ChooseMask,
    unit: int,
    every: int,
) -> Pruned:
    """The column sweep with rounding. ``unit``: columns that no block may cut apart; ``every``: chosen together."""
    C = W.shape[1]
    scheme.check(C)
    U, note = inverse_cholesky(H, damp)
    importance = H.diagonal() + damp * H.diagonal().mean()
    block = math.lcm(scheme.group_size, unit) if scheme.group_size else max(1, 128 // unit) * unit
    grids: list[Grid] = []

    def fit(weights: Float[Tensor, "R width"], start: int) -> Grid:
        columns = slice(start, start + weights.shape[1])
        kept = weights * choose(weights, U.diagonal()[columns], start)
        return fit_grid(kept, scheme, importance[columns])

    row_grid = None if scheme.group_size else fit(W, 0)

    def begin(weights: Float[Tensor, "R width"], start: int) -> RoundColumn:
        if row_grid is not None:
            return column_rounder(row_grid, scheme, 0, C)
        grids.append(fit(weights, start))
        return column_rounder(grids[-1], scheme, start, C)

    rounded, mask = obs_sweep(W, U, choose, block, min(every, block), begin)
    grid = row_grid or Grid(torch.cat([g.scale for g in grids], 1), torch.cat([g.zero_point for g in grids], 1))
    return _on_grid(rounded, mask, grid, note)


def _on_grid(W: Float[Tensor, "R C"], kept: Bool[Tensor, "R C"], grid: Grid, note: str = "") -> Pruned:
    return apply_mask(W, kept & (W != 0), note)._replace(grid=grid)
