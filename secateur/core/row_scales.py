"""Learned scales of a matrix, one for each row and group of its inputs (CAST, arXiv:2509.25996): W' = A ⊙ W.

The inputs of every row lie in n groups of neighbours, and A holds one number for each, 1 in the beginning. It is a
reparametrisation: a step of A moves the weights of a group together, which no step of single weights does, and at the
end A is multiplied into W and is gone.

With G the gradient at W' the chain rule gives A ⊙ G at W, and at A the sum of W ⊙ G over every group. Nothing here
needs to know how the matrix is stored: A is shorter than W along the axis of its inputs and along no other.

R = out_features, C = in_features, n = groups; W is (..., R, C) and A (..., R, n), or (..., C, R) and (..., n, R).
"""

import torch
from jaxtyping import Float
from torch import Tensor


def check_groups(C: int, n: int) -> None:
    """ValueError where n groups of equal length do not make C inputs."""
    if n < 0 or (n and C % n):
        raise ValueError(f"scales {n} wants in_features divisible by {n}, got {C}; choose a divisor, or 0 for none")


def scaled(W: Float[Tensor, "..."], A: Float[Tensor, "..."] | None) -> Float[Tensor, "..."]:
    """A ⊙ W; W itself where there are no scales."""
    return W if A is None else W * spread(A, W.shape)


def spread(A: Float[Tensor, "..."], shape: torch.Size) -> Float[Tensor, "..."]:
    """Every scale once for each weight of its group."""
    axis = _inputs(A, shape)
    return A.repeat_interleave(shape[axis] // A.shape[axis], dim=axis)


def group_sums(values: Float[Tensor, "..."], A: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The sum of the values of every group, in the shape of A."""
    axis = _inputs(A, values.shape)
    return values.unflatten(axis, (A.shape[axis], -1)).sum(dim=axis + 1)


def _inputs(A: Float[Tensor, "..."], shape: torch.Size) -> int:
    """The axis along which A is shorter; the last where it is not."""
    shorter = [axis for axis, size in enumerate(A.shape) if size != shape[axis]]
    return shorter[0] if shorter else A.ndim - 1
