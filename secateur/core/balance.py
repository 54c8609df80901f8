"""Moving difficulty between a linear and what feeds it: inputs are divided by s, columns of W multiplied by it.

y = (X / s) (W s)ᵀ is the same function for any positive s, one number an input channel. SmoothQuant (arXiv:2211.10438,
eq. 4) evens out the ranges of inputs and weights, so that inputs whose channels differ widely fit an 8 bit grid. AWQ
(arXiv:2306.00978, eq. 5) makes the columns that large inputs meet larger, so that their rounding counts for less, as
far as a search finds that to pay.

Here s is rounded to powers of two. Dividing by one changes no digit of a number, so what is folded is the same function
to the last bit, and a zero stays a zero. (float16 has no room for it: below 6e-5 digits are lost.)

R = out_features, C = in_features. H = XᵀX / tokens.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.grid import Scheme, fit_grid, on_grid
from secateur.core.solver import relative_error

FURTHEST = 8
"""Largest exponent of two."""
STRENGTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Exponents that AWQ's search tries; 0 leaves everything as it is."""


def smoothing(inputs: Float[Tensor, " C"], weights: Float[Tensor, " C"], strength: float = 0.5) -> Float[Tensor, " C"]:
    """s from the largest |input| and |weight| of a channel: x^strength / w^(1 - strength), about 1 in the middle."""
    used = (inputs > 0) & (weights > 0)
    s = torch.where(used, inputs, 1.0).pow(strength) / torch.where(used, weights, 1.0).pow(1 - strength)
    middle = s[used].log2().median() if bool(used.any()) else torch.zeros(())
    return power_of_two(torch.where(used, s / middle.exp2(), 1.0))


def searched(
    W: Float[Tensor, "R C"], H: Float[Tensor, "C C"], scheme: Scheme, *, weighted: bool = True
) -> Float[Tensor, " C"]:
    """AWQ's s: the power of the inputs' sizes after which rounding to nearest loses least of the output.

    Differs from the public code: an input's size is its root mean square, not the mean of its magnitude. ``weighted``
    tries scales where an input counts by its second moment, as GPTQ will have them, else those of plain RTN.
    """
    energy = H.diagonal()
    if not bool((energy > 0).any()):
        return torch.ones_like(energy)
    size = energy.clamp(min=float(energy[energy > 0].min())).sqrt()
    least, best = torch.inf, torch.ones_like(size)
    for strength in STRENGTHS:
        s = size.pow(strength)
        s = power_of_two(s / (s.max() * s.min()).sqrt())
        grid = fit_grid(W * s, scheme, energy / s.square() if weighted else None)
        rounded = on_grid(W * s, grid, scheme) / s
        lost = relative_error(W, rounded, H)
        if lost < least:
            least, best = lost, s
    return best


def power_of_two(s: Float[Tensor, " C"]) -> Float[Tensor, " C"]:
    """The nearest one in the logarithm, of at most FURTHEST twos."""
    return s.log2().round().clamp(-FURTHEST, FURTHEST).exp2()
