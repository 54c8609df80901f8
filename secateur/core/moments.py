"""Streaming second moments of a linear's inputs: additive, any number of tokens.

Stored as a plain sum and a token count; solvers see the mean. We call the mean Gram matrix H = XᵀX / tokens, as the
papers do (it is half the Hessian of a linear's squared error per token; factors of two and of the sample count that the
papers put in front cancel everywhere, because damping is relative to mean(diag H)).

Products are taken in float32 (float64 inputs stay float64) whatever the model's dtype; call outside any autocast
region, where ``x.float() @ y.float()`` would silently run in 16 bit. Memory: C * C float32 per distinct input (485 MB
at C = 11,008). Time: 2 T C² floating-point operations.

T = tokens, C = in_features, K = width of a second variable.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


def batch_rows(X: Float[Tensor, "*batch T C"]) -> Float[Tensor, "rows T C"]:
    """The rows of a batch, to be taken one after the other: a sum over tokens then does not depend, not even in a bit,
    on how many rows came together."""
    return X[None] if X.ndim == 2 else X.flatten(0, -3)


class Observed(NamedTuple):
    """What is kept of moments when all tokens are in."""

    H: Float[Tensor, "C C"] | Float[Tensor, " C"]
    """The mean Gram matrix, or its diagonal."""
    tokens: int


@dataclass
class Gram:
    """Sum of xᵀx over tokens: what SparseGPT, ADMM and least squares need."""

    sum: Float[Tensor, "C C"]
    tokens: int = 0

    @classmethod
    def zeros(cls, C: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> "Gram":
        return cls(torch.zeros(C, C, device=device, dtype=dtype))

    def update(self, X: Float[Tensor, "*batch T C"]) -> None:
        for rows in batch_rows(X.to(self.sum.dtype)):
            self.sum.addmm_(rows.T, rows)
            self.tokens += rows.shape[0]

    def mean(self) -> Float[Tensor, "C C"]:
        return self.sum / max(self.tokens, 1)

    def observed(self) -> Observed:
        return Observed(self.mean(), self.tokens)


@dataclass
class ColumnNorms:
    """Sum of x² over tokens, the diagonal of ``Gram``: all that Wanda needs."""

    sum: Float[Tensor, " C"]
    tokens: int = 0

    @classmethod
    def zeros(cls, C: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> "ColumnNorms":
        return cls(torch.zeros(C, device=device, dtype=dtype))

    def update(self, X: Float[Tensor, "*batch T C"]) -> None:
        for rows in batch_rows(X.to(self.sum.dtype)):
            self.sum += rows.square().sum(dim=0)
            self.tokens += rows.shape[0]

    def mean(self) -> Float[Tensor, " C"]:
        return self.sum / max(self.tokens, 1)

    def observed(self) -> Observed:
        return Observed(self.mean(), self.tokens)


@dataclass
class CrossMoments:
    """Sum of zᵀx over tokens: the right-hand side of a least-squares fit of z on x."""

    sum: Float[Tensor, "K C"]
    tokens: int = 0

    @classmethod
    def zeros(
        cls, K: int, C: int, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> "CrossMoments":
        return cls(torch.zeros(K, C, device=device, dtype=dtype))

    def update(self, Z: Float[Tensor, "*batch T K"], X: Float[Tensor, "*batch T C"]) -> None:
        for z, x in zip(batch_rows(Z.to(self.sum.dtype)), batch_rows(X.to(self.sum.dtype)), strict=True):
            self.sum.addmm_(z.T, x)
            self.tokens += x.shape[0]

    def mean(self) -> Float[Tensor, "K C"]:
        return self.sum / max(self.tokens, 1)


@dataclass
class Totals:
    """Sums of plain numbers over tokens, in float64."""

    sum: Float[Tensor, " n"]
    tokens: int = 0

    @classmethod
    def zeros(cls, n: int, device: torch.device | None = None) -> "Totals":
        return cls(torch.zeros(n, device=device, dtype=torch.float64))


SLICE = 256
"""Rows of a Gram matrix that are looked at in float64 at one time."""
Moments = Gram | ColumnNorms | CrossMoments | Totals
Combine = Callable[[Moments], None]
"""Adds to moments, in place, what other processes hold of the same: each of them sees a part of the tokens."""


def alone(moments: Moments) -> None:
    """All tokens are in this process."""


@dataclass(frozen=True)
class Inputs:
    """What moments tell of the inputs behind them."""

    tokens: int
    columns: int
    dead: int
    """Columns that were zero for every token: nothing is known of their weights, and nothing depends on them."""
    dimension: float | None
    """tr(H)² / |H|², the directions that carry the energy: 1 where one carries all, at most min(tokens, columns). None
    where only norms were kept."""
    largest: float | None
    """Mean square of the largest column over their median: thousands where a few activations are massive. None where
    half of the columns are dead."""


def inputs_of(observed: Observed) -> Inputs:
    """Costs a pass over H, a few rows at a time: in float64 all of a wide Gram matrix would be a gigabyte."""
    H = observed.H
    norms = (H.diagonal() if H.ndim == 2 else H).double()
    energy, median = float(norms.sum()), float(norms.median())
    dimension = None
    if H.ndim == 2 and energy > 0:
        dimension = energy**2 / sum(float(rows.double().square().sum()) for rows in H.split(SLICE))
    largest = float(norms.max()) / median if median > 0 else None
    return Inputs(observed.tokens, len(norms), int((norms == 0).sum()), dimension, largest)
