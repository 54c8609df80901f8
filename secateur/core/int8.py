"""int8 weights and int8 activations (W8A8) with fixed scales, as integer kernels of CPUs take them. Zeros stay zeros.

    y ≈ (s * codes) @ (a * (q - z)),   codes = round(W / s) in -127..127 by rows,   q = round(x / a) + z in 0..255

Weights are symmetric per row, so a zero weight has the code 0 whatever s is: nothing of a sparse pattern is lost.
Activations have one scale for the whole tensor, which a few large input columns would spoil; `balance` moves a part of
their size into the weights first (SmoothQuant, arXiv:2211.10438, equation 4). It multiplies columns of W by positive
numbers, which keeps zeros too.

R = out_features, C = in_features, T = tokens.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

WEIGHT_PEAK, LEVELS = 127, 255
"""The largest code of a weight, and the largest of an activation; the smallest are -127 and 0."""
TINY = 1e-5
"""Below this a column counts as empty: dividing by less makes scales of noise."""


@dataclass
class Extremes:
    """Smallest and largest value of every input column, over any number of tokens. Both begin at 0."""

    low: Float[Tensor, " C"]
    high: Float[Tensor, " C"]

    @classmethod
    def zeros(cls, C: int) -> "Extremes":
        return cls(torch.zeros(C), torch.zeros(C))

    def update(self, X: Float[Tensor, "*batch T C"]) -> None:
        rows = X.reshape(-1, X.shape[-1]).float()
        self.low = torch.minimum(self.low, rows.amin(0))
        self.high = torch.maximum(self.high, rows.amax(0))

    @property
    def peak(self) -> Float[Tensor, " C"]:
        """max |x| of every column."""
        return torch.maximum(-self.low, self.high)


def balance(inputs: Float[Tensor, " C"], weights: Float[Tensor, " C"], share: float) -> Float[Tensor, " C"]:
    """What columns of x are divided by and columns of W multiplied with: max|x|^share / max|W|^(1 - share).

    ``share`` 0 moves nothing that x has, 1 all of it; a column that never moves, or without a weight, stays as it is.
    """
    found = inputs.clamp(min=TINY) ** share / weights.clamp(min=TINY) ** (1 - share)
    return torch.where((inputs > TINY) & (weights > TINY), found, 1.0)


def row_codes(W: Float[Tensor, "R C"]) -> tuple[Int8[Tensor, "R C"], Float[Tensor, "R 1"]]:
    """Codes and the scale of every row, rounded to the nearest. A row of zeros has the scale 1."""
    peak = W.float().abs().amax(1, keepdim=True)
    scale = torch.where(peak > 0, peak / WEIGHT_PEAK, 1.0)
    return (W.float() / scale).round().to(torch.int8), scale


def input_step(low: float, high: float) -> tuple[float, int]:
    """Scale a and zero point z of activations between ``low`` <= 0 <= ``high``; 0 is a code of its own, exactly."""
    if not low <= 0 <= high:
        raise ValueError(f"a range from {low} to {high} has no 0 inside; widen it")
    scale = max(high - low, TINY) / LEVELS
    return scale, round(-low / scale)
