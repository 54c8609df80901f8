"""Factorisations with a visible damping ladder, and the least-squares fit built on them.

Calibration Grams are often rank deficient: a LayerNorm output has rank d - 1, a dead neuron gives a zero column, few
tokens give few directions. A ridge, ``damp`` times mean(diag H), makes them definite and keeps the solution near the
original weights in directions that the data does not excite. Where a factorisation fails all the same it is tried in
float64, then with the ridge raised tenfold, up to 1000 times, and the result says so; past that a NumericalError tells
what to do. H is never replaced by the identity.

C = in_features, R = out_features, K = any number of right-hand sides.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.errors import NumericalError

LADDER = (1.0, 10.0, 100.0, 1000.0)


class Factor(NamedTuple):
    """A lower Cholesky factor of H + ridge * I, and what it took to get it."""

    L: Float[Tensor, "C C"]
    ridge: float
    """Absolute ridge that was added."""
    note: str
    """Empty, or the line that tells that the ridge had to be raised."""


def mean_diagonal(H: Float[Tensor, "C C"]) -> float:
    """Mean of diag(H), the scale that damping is relative to. NumericalError where it is zero or not finite."""
    scale = float(H.diagonal().mean())
    if not all_finite(H):
        bad = int((~torch.isfinite(H)).sum())
        raise NumericalError(
            f"{bad} of {H.numel()} second moments are not finite; the inputs overflow: use a wider dtype"
        )
    if scale <= 0:
        raise NumericalError("every calibration input of this linear is zero, so nothing was learnt of it; exclude it")
    return scale


def all_finite(M: Tensor) -> bool:
    """Whether no element is infinite or nan; a finite sum says so in one pass, any other needs a closer look."""
    return bool(torch.isfinite(M.sum())) or bool(torch.isfinite(M).all())


def channel_norms(H: Float[Tensor, "C C"]) -> Float[Tensor, " C"]:
    """Root mean square of every input channel, bounded from below by a millionth of the largest (dead channels)."""
    mean_diagonal(H)
    norms = H.diagonal().clamp(min=0).sqrt()
    return norms.clamp(min=1e-6 * float(norms.max()))


def cholesky(H: Float[Tensor, "C C"], damp: float) -> Factor:
    """Lower Cholesky factor of H + damp * mean(diag H) * I, climbing the ladder where that is not definite."""
    scale = mean_diagonal(H)
    for rung in LADDER:
        ridge = max(damp, 1e-6) * rung * scale if rung > 1 else damp * scale
        raised = [f"damping raised {rung:g}-fold to {ridge / scale:.3g} x mean(diag H)"] if rung > 1 else []
        for dtype, said in ((H.dtype, []), (torch.float64, ["factored in float64"])):
            L = _factor(H.to(dtype), ridge)
            if L is not None:
                return Factor(L.to(H.dtype), ridge, ", ".join(raised + said))
    size = H.shape[0]
    raise NumericalError(
        f"a {size}x{size} Gram matrix is not positive definite even with damping raised {LADDER[-1]:g}-fold "
        f"from {damp:g} x mean(diag H); use more calibration samples, or a larger damp"
    )


def _factor(H: Float[Tensor, "C C"], ridge: float) -> Float[Tensor, "C C"] | None:
    """Lower Cholesky factor of H + ridge I; None where that is not definite in H's precision."""
    shifted = H.clone()
    shifted.diagonal().add_(ridge)
    L, info = shifted.mT, torch.empty((), dtype=torch.int32, device=H.device)  # column-major, as LAPACK wants it
    torch.linalg.cholesky_ex(L, out=(L, info))  # in place: a wide H is a good part of what a run holds
    return L if int(info) == 0 and all_finite(L) else None


def inverse_cholesky(H: Float[Tensor, "C C"], damp: float) -> tuple[Float[Tensor, "C C"], str]:
    """Upper U with (H + ridge I)⁻¹ = Uᵀ U, the factor that the OBS column sweep reads, and the ladder's note.

    One Cholesky and one triangular inverse (2/3 C³) instead of factor, invert, factor (4/3 C³): with J the reversal of
    the index order, J H J = L Lᵀ gives H = V Vᵀ with V = J L J upper, hence U = V⁻¹ = J L⁻¹ J.
    """
    factor = cholesky(H.flip(0, 1), damp)
    eye = torch.eye(H.shape[0], device=H.device, dtype=H.dtype)
    U = torch.linalg.solve_triangular(factor.L, eye, upper=False).flip(0, 1)
    return U.contiguous(), factor.note


def fit(
    W0: Float[Tensor, "R C"], H: Float[Tensor, "C C"], residual: Float[Tensor, "R C"], damp: float
) -> Float[Tensor, "R C"]:
    """Least-squares weights of a target Y on inputs X, with a ridge towards W0 instead of towards zero.

    W = W0 + residual (H + damp mean(diag H) I)⁻¹, where H = XᵀX / tokens and residual = (Y - X W0ᵀ)ᵀX / tokens is what
    W0 leaves unexplained (summed as such: forming YᵀX - W0 H afterwards would cancel). Directions that X does not
    excite keep W0, where a pseudo-inverse returns 0 or amplified rounding noise.
    """
    return fit_change(residual, H, damp).add_(W0)


def fit_change(residual: Float[Tensor, "R C"], H: Float[Tensor, "C C"], damp: float) -> Float[Tensor, "R C"]:
    """W - W0 of ``fit``."""
    return torch.cholesky_solve(residual.T, cholesky(H, damp).L).T
