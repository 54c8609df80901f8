"""A linear's matrix as (out, in), however the module stores it: Conv1D of transformers (GPT-2) holds the transpose."""

from typing import cast

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

PlainLinear = nn.Linear | Conv1D
"""A module with one matrix of its own."""


def stored_transposed(linear: nn.Module) -> bool:
    """Whether the weight is (in, out)."""
    return isinstance(linear, Conv1D)


def turned(linear: nn.Module, tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """What lies as the weight does, as (out, in), and what is (out, in) as the weight lies: a view."""
    return tensor.T if stored_transposed(linear) else tensor


def matrix(linear: nn.Module) -> Float[Tensor, "R C"]:
    """The weight as (out, in), a view."""
    return turned(linear, cast(Tensor, linear.weight).detach())
