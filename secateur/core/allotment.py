"""One threshold over many matrices: how many zeros fall on each when the smallest scores of all of them go.

Global magnitude pruning in its plain form (arXiv:2003.03033 compares the forms): scores of all matrices on one scale. A
matrix whose weights are small, or that a norm before it has made small, loses more, so none may lose more than ``MOST``
of its weights: an empty one would cut the model in two.

Float32 numbers that are not negative are ordered as their bits are, so the threshold is found by halving the range of
bits, exactly, in 31 rounds of counting. Nothing is sorted or kept: a round needs a number from each matrix, which is
all that must travel where matrices lie in several processes.

n = matrices.
"""

from collections.abc import Callable

import torch
from jaxtyping import Integer
from torch import Tensor

MOST = 0.95
"""Share of one matrix that may be zero."""
INFINITY = 0x7F800000
"""Its bits as float32."""

Below = Callable[[int], Integer[Tensor, " n"]]
"""How many scores of every matrix have smaller bits than this."""


def allotted(below: Below, sizes: Integer[Tensor, " n"], zeros: int) -> Integer[Tensor, " n"]:
    """Zeros of each matrix, ``zeros`` together: its scores below the threshold, and some of those that equal it.

    Of equal scores those in the first matrices stay. ValueError where so many zeros leave less than 1 - MOST of some.
    """
    most = (sizes.double() * MOST).ceil().long()
    if zeros > int(most.sum()):
        raise ValueError(
            f"{zeros} zeros in {int(sizes.sum())} weights leave some matrix less than {1 - MOST:.0%} of its own; at "
            f"most {int(most.sum())} fit; lower the sparsity"
        )

    def taken(bits: int) -> Integer[Tensor, " n"]:
        return torch.minimum(below(bits), most)

    low, high = 0, INFINITY + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if int(taken(middle).sum()) <= zeros else (low, middle)
    certain = taken(low)
    equal = (taken(low + 1) - certain).flip(0).cumsum(0).clamp(max=zeros - int(certain.sum()))
    return certain + equal.diff(prepend=equal.new_zeros(1)).flip(0)
