"""The optimal-brain-surgeon column sweep, written once for every method that visits columns from left to right.

For each column j, in order: decide which of its weights go, take the error e = (w - kept) / U_jj, and let every column
to the right make up for it, W[:, k] -= e U[j, k] (Algorithm 1 of SparseGPT, arXiv:2301.00774). U is the upper factor of
the inverse damped Gram matrix, H⁻¹ = Uᵀ U. What is kept may be the weight itself (SparseGPT), its nearest value on a
grid (GPTQ, arXiv:2210.17323: nothing goes, every column is rounded), or both in one pass (section 3.5 of SparseGPT):
"which go" and "round this column" are functions that the caller passes in.

The arithmetic is R C² multiply-adds, but done column by column it is a stream of tiny memory-bound operations. So the
sweep is two-level: rank-one updates stay inside a panel of 16 columns, one matrix product carries a panel's errors to
the rest of its column block, and one carries a block's errors to the rest of the matrix. The weights are held
transposed, so that a column is contiguous. The results are those of the naive loop up to rounding.

R = out_features, C = in_features.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.grid import RoundColumn

PANEL = 16

ChooseMask = Callable[[Float[Tensor, "R width"], Float[Tensor, " width"], int], Bool[Tensor, "R width"]]
"""(current weights of some columns, diag(U) of them, first column) -> True where a weight stays."""
BeginBlock = Callable[[Float[Tensor, "R width"], int], RoundColumn]
"""(current weights of a column block, its first column) -> what rounds its columns: scales are settled here."""


def obs_sweep(
    W: Float[Tensor, "R C"],
    U: Float[Tensor, "C C"],
    choose: ChooseMask,
    column_block: int,
    choose_every: int,
    begin: BeginBlock | None = None,
) -> tuple[Float[Tensor, "R C"], Bool[Tensor, "R C"]]:
    """Prune W from left to right; returns the compensated weights (not yet masked) and the mask.

    ``choose`` is asked once per ``choose_every`` columns, with the weights as all columns further left have left them:
    a whole column block for unstructured patterns, M columns for N:M. With ``begin``, asked once per column block, the
    kept weights are rounded, each column as it is reached.
    """
    Wt = W.T.contiguous().clone()  # (C, R), ours from here on
    gone = torch.empty_like(Wt)  # 1 where a weight goes, 0 where it stays
    C = Wt.shape[0]
    for start in range(0, C, column_block):
        stop = min(start + column_block, C)
        rounded = begin(Wt[start:stop].T, start) if begin else None
        errors = _sweep_block(Wt, U, gone, choose, start, stop, choose_every, rounded)
        Wt[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    return Wt.T, gone.T == 0


def _sweep_block(
    Wt: Tensor,
    U: Tensor,
    gone: Tensor,
    choose: ChooseMask,
    start: int,
    stop: int,
    choose_every: int,
    rounded: RoundColumn | None,
) -> Float[Tensor, "width R"]:
    errors = torch.empty_like(Wt[start:stop])
    columns, leaving, lost = (rows.unbind() for rows in (Wt[start:stop], gone[start:stop], errors))
    scales = U.diagonal()[start:stop].tolist()
    panel = choose_every * max(1, PANEL // choose_every) if choose_every < stop - start else PANEL
    if choose_every >= stop - start:
        _choose(Wt, U, gone, choose, start, stop)
    for left in range(start, stop, panel):
        right = min(left + panel, stop)
        for j in range(left, right):
            i = j - start
            if choose_every < stop - start and i % choose_every == 0:
                _choose(Wt, U, gone, choose, j, min(j + choose_every, stop))
            if rounded is None:
                torch.mul(columns[i], leaving[i], out=lost[i])
            else:
                kept = rounded(columns[i] * (1 - leaving[i]), j)
                torch.sub(columns[i], kept, out=lost[i])
                columns[i].copy_(kept)
            lost[i].div_(scales[i])
            Wt[j + 1 : right].addr_(U[j, j + 1 : right], lost[i], alpha=-1)
        Wt[right:stop].addmm_(U[left:right, right:stop].T, errors[left - start : right - start], alpha=-1)
    return errors


def _choose(Wt: Tensor, U: Tensor, gone: Tensor, choose: ChooseMask, start: int, stop: int) -> None:
    gone[start:stop] = ~choose(Wt[start:stop].T, U.diagonal()[start:stop], start).T
