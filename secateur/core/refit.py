"""Least squares under a mask that stays as it is: the refiner behind SparseLLM's rounds.

Every row of W has its own support, so its exact fit is a linear system of its own (R Cholesky factorisations of up to
C³ / 3). Conjugate gradients solve many rows at once with products by H alone; in channel-normalised units, where H has
a unit diagonal (Jacobi preconditioning), a handful of them is enough.

R = out_features, C = in_features. Masks are bool, True = kept. Cost: iterations * 2 R C²; memory C² + R C floats, and
six times the slice of W that is worked on.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.core.linalg import channel_norms

ITERATIONS = 10
SLICE = 1 << 22
"""Weights of the rows that are fitted at one time (16 MB in float32); rows are independent of each other."""


def masked_fit(
    W0: Float[Tensor, "R C"],
    H: Float[Tensor, "C C"],
    mask: Bool[Tensor, "R C"],
    damp: float,
    iterations: int = ITERATIONS,
) -> Float[Tensor, "R C"]:
    """argmin over W on the mask of tr((W - W0) H (W - W0)ᵀ) + damp |W - W0|² in normalised units.

    ``iterations`` conjugate-gradient steps from mask * W0, each of which lowers it.
    """
    norms = channel_norms(H)
    G = H / torch.outer(norms, norms)
    G.diagonal().add_(damp)
    fitted, rows = torch.empty_like(W0), max(1, SLICE // W0.shape[1])
    for out, W, kept in zip(fitted.split(rows), W0.split(rows), mask.split(rows), strict=True):
        torch.div(_normalised_fit(W * norms, G, kept.to(W.dtype), iterations), norms, out=out)
    return fitted


def _normalised_fit(
    W0: Float[Tensor, "R C"], G: Float[Tensor, "C C"], kept: Float[Tensor, "R C"], iterations: int
) -> Float[Tensor, "R C"]:
    """The same where H has a unit diagonal and holds the ridge already."""
    W = W0 * kept
    residual = (W0 - W) @ G * kept
    direction, old = residual, residual.square().sum(dim=1, keepdim=True)
    for _ in range(iterations):
        moved = direction @ G * kept
        length = old / (direction * moved).sum(dim=1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
        W = torch.addcmul(W, length, direction)
        residual = torch.addcmul(residual, length, moved, value=-1)
        new = residual.square().sum(dim=1, keepdim=True)
        direction = torch.addcmul(residual, new / old.clamp_min(torch.finfo(W.dtype).tiny), direction)
        old = new
    return W
