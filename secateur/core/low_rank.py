"""A low-rank branch beside a pruned matrix: y = x Wᵀ + (x Xᵀ) Sᵀ, with W sparse, S of R x r, X of r x C.

Two ways to begin. ``group_mean`` is SLoRB's (AST, arXiv:2407.20584): X sums groups of k consecutive inputs and is a
constant, S holds the means of what was pruned from each group, which keeps every group's sum of weights; it is to be
trained. ``residual_fit`` needs no training: the best branch of its rank for whatever the output lacks on the inputs
that were seen (reduced-rank regression), a truncated singular value decomposition in the metric of H. Where all that
is lacking is lost weights, so residual = lost H, it is EoRA (arXiv:2410.21271).

Neither can be folded into a sparse W. At rank C / 16 and 2:4 it is a quarter as many numbers as survive in a square W.

R = out_features, C = in_features, r = rank. Masks are bool, True = kept.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.linalg import cholesky

DAMP = 0.01
"""Ridge of ``residual_fit``, as a share of mean(diag H)."""


class Branch(NamedTuple):
    """The two factors."""

    S: Float[Tensor, "R r"]
    X: Float[Tensor, "r C"]

    @property
    def product(self) -> Float[Tensor, "R C"]:
        """What the branch adds to W."""
        return self.S @ self.X

    @property
    def size(self) -> int:
        """Numbers that are stored."""
        return self.S.numel() + self.X.numel()


def group_mean(W: Float[Tensor, "R C"], mask: Bool[Tensor, "R C"], k: int) -> Branch:
    """SLoRB's start: X_ij = 1 for the k inputs j of group i, S_ni the mean of row n's pruned weights in group i.

    S X is the least-squares fit of the pruned weights for that X. Raises ValueError where k does not divide C.
    """
    R, C = W.shape
    if k < 1 or C % k:
        raise ValueError(f"groups of k inputs need k to divide in_features, got k = {k} and {C}; choose a divisor")
    S = torch.where(mask, 0.0, W).view(R, C // k, k).mean(dim=2)
    return Branch(S, torch.eye(C // k, device=W.device, dtype=W.dtype).repeat_interleave(k, dim=1))


def residual_fit(residual: Float[Tensor, "R C"], H: Float[Tensor, "C C"], rank: int) -> Branch:
    """argmin over rank r of E|e - S X x|² + ridge |S X|², where residual = E[e xᵀ], ridge = DAMP mean(diag H).

    The error E|e - S X x|² is never larger than E|e|². With H' = H + ridge I = L Lᵀ it is |residual L⁻ᵀ - S X L|² but
    for a constant, so S X L is the truncated SVD of residual L⁻ᵀ (Eckart and Young). Raises ValueError for a rank that
    residual cannot have. Cost: C³ / 3 + R C² and an SVD of R x C.
    """
    _check_rank(residual, rank)
    L = cholesky(H, DAMP).L
    return _truncated(torch.linalg.solve_triangular(L, residual.T, upper=False).T, L, rank)


def _check_rank(M: Float[Tensor, "R C"], rank: int) -> None:
    most = min(M.shape)
    if not 1 <= rank <= most:
        raise ValueError(f"the rank must lie in 1..{most} for a matrix of {tuple(M.shape)}, got {rank}")


def _truncated(M: Float[Tensor, "R C"], L: Float[Tensor, "C C"], rank: int) -> Branch:
    """The S and X of their rank for which S X L is nearest to M."""
    U, sigma, Vt = torch.linalg.svd(M, full_matrices=False)
    X = torch.linalg.solve_triangular(L, Vt[:rank], upper=False, left=False)
    return Branch(U[:, :rank] * sigma[:rank], X)
