"""Moving difficulty between a linear and what feeds it: inputs are divided by s, columns of W multiplied by it.

y = (X / s) (W s)ᵀ is the same function for any positive s, one number an input channel. SmoothQuant (arXiv:2211.10438,
eq. 4) evens out the ranges of inputs and weights, so that inputs whose channels differ widely fit an 8 bit grid.

Here s is rounded to powers of two. Dividing by one changes no digit of a number, so what is folded is the same function
to the last bit in any floating-point type, and a zero stays a zero.

AWQ (arXiv:2306.00978) scales columns too, to make the rounding of those that large inputs meet count for less. It has
no place here: scales of least error where an input counts by its second moment (``core.grid.fit_grid``) gain more, and
scaling on top of them gains nothing (docs/quantize.md has the numbers).

C = in_features.
"""

import torch
from jaxtyping import Float
from torch import Tensor

FURTHEST = 8
"""Largest exponent of two."""


def smoothing(inputs: Float[Tensor, " C"], weights: Float[Tensor, " C"], strength: float = 0.5) -> Float[Tensor, " C"]:
    """s from the largest |input| and |weight| of a channel: x^strength / w^(1 - strength), about 1 in the middle."""
    used = (inputs > 0) & (weights > 0)
    s = torch.where(used, inputs, 1.0).pow(strength) / torch.where(used, weights, 1.0).pow(1 - strength)
    middle = s[used].log2().median() if bool(used.any()) else torch.zeros(())
    return power_of_two(torch.where(used, s / middle.exp2(), 1.0))


def power_of_two(s: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
    """The nearest one in the logarithm, of at most FURTHEST twos."""
    return s.log2().round().clamp(-FURTHEST, FURTHEST).exp2()
