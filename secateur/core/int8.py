"""Fixed scales of activations in int8: 256 steps over the range that calibration saw, one scale for the whole tensor.

    q = round(x / a) + z in 0..255,   0 is the code z exactly

A few large input columns would spoil such a scale; ``core.balance.smoothing`` moves a part of their size into the
weights first, which ``core.grid`` then rounds per row.

C = in_features, T = tokens.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LEVELS = 255
"""The largest code; the smallest is 0."""
TINY = 1e-5
"""Ranges are at least this wide: dividing by less makes scales of noise."""


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


def input_step(low: float, high: float) -> tuple[float, int]:
    """Scale a and zero point z of activations between ``low`` <= 0 <= ``high``; 0 is a code of its own, exactly."""
    if not low <= 0 <= high:
        raise ValueError(f"a range from {low} to {high} has no 0 inside; widen it")
    scale = max(high - low, TINY) / LEVELS
    return scale, round(-low / scale)
