"""Elementwise activations phi of a feed-forward network, each with its analytic derivative.

A feed-forward network computes down(phi(up(x))) or down(phi(gate(x)) * up(x)). SparseLLM's Gauss-Newton step (see
``core.feedforward``) needs phi and phi', and the layout of a block is recognised by trying every phi of this table, so
a new activation is one row here and nothing anywhere else. The identity is left out on purpose: it is no activation,
and it would "recognise" any linear chain.

One kind is not fixed: xIELU bends by two numbers that the model learned, other ones in every block. Its row in
``LEARNED`` says how to find them from inputs and outputs, and what activation they make.

Every function works elementwise in the dtype it is given.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Elementwise = Callable[[Float[Tensor, "*shape"]], Float[Tensor, "*shape"]]

TANH_SLOPE = math.sqrt(2 / math.pi)
QUICK_SLOPE = 1.702


class Activation(NamedTuple):
    """phi and its derivative. At a kink (relu at 0) the derivative is torch's own choice, 0."""

    name: str
    f: Elementwise
    df: Elementwise


def gelu_tanh(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The tanh approximation of GELU: ``gelu_new`` and ``gelu_pytorch_tanh`` of transformers."""
    return F.gelu(z, approximate="tanh")


def quick_gelu(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """z sigmoid(1.702 z), CLIP's approximation."""
    return z * torch.sigmoid(QUICK_SLOPE * z)


def relu2(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Squared ReLU, arXiv:2109.08668."""
    return F.relu(z).square()


def d_relu(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return (z > 0).to(z.dtype)


def d_relu2(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return 2 * F.relu(z)


def d_sigmoid(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    s = torch.sigmoid(z)
    return s * (1 - s)


def d_tanh(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return 1 - torch.tanh(z).square()


def d_silu(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return torch.sigmoid(z) + z * d_sigmoid(z)


def d_quick_gelu(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    return torch.sigmoid(QUICK_SLOPE * z) + QUICK_SLOPE * z * d_sigmoid(QUICK_SLOPE * z)


def d_gelu(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """GELU is z Phi(z), Phi the normal distribution; its derivative Phi(z) + z Phi'(z)."""
    distribution = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    density = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return distribution + z * density


def d_gelu_tanh(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    t = torch.tanh(TANH_SLOPE * (z + 0.044715 * z**3))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t.square()) * TANH_SLOPE * (1 + 3 * 0.044715 * z.square())


ACTIVATIONS: dict[str, Activation] = {
    row.name: row
    for row in (
        Activation("relu", F.relu, d_relu),
        Activation("silu", F.silu, d_silu),
        Activation("gelu", F.gelu, d_gelu),
        Activation("gelu_tanh", gelu_tanh, d_gelu_tanh),
        Activation("quick_gelu", quick_gelu, d_quick_gelu),
        Activation("relu2", relu2, d_relu2),
        Activation("sigmoid", torch.sigmoid, d_sigmoid),
        Activation("tanh", torch.tanh, d_tanh),
    )
}


def xielu(above: float, below: float) -> Activation:
    """xIELU (arXiv:2411.13010): z/2 + above z² for positive z, z/2 + below (eᶻ - 1 - z) for negative z."""

    def f(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        positive, negative = xielu_parts(z)
        return 0.5 * z + above * positive + below * negative

    def df(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return 0.5 + 2 * above * F.relu(z) + below * torch.expm1(z.clamp(max=0))

    return Activation("xielu", f, df)


def xielu_parts(z: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """What the two learned numbers multiply; where one part is not zero, the other is."""
    negative = z.clamp(max=0)
    return relu2(z), torch.expm1(negative) - negative


def fit_xielu(z: Float[Tensor, "*shape"], a: Float[Tensor, "*shape"]) -> tuple[float, float]:
    """The two numbers with which xielu(z) comes nearest to a: least squares, each over its own sign of z."""
    z, a = z.float(), a.float()
    left = a - 0.5 * z
    positive, negative = (float((left * part).sum() / part.square().sum().clamp_min(1e-30)) for part in xielu_parts(z))
    return positive, negative


class Learned(NamedTuple):
    """An activation with learned numbers: how to find them, how to make it of them."""

    fit: Callable[[Tensor, Tensor], tuple[float, ...]]
    """From inputs z and outputs a."""
    make: Callable[..., Activation]


LEARNED: dict[str, Learned] = {"xielu": Learned(fit_xielu, xielu)}


def activation(name: str, learned: tuple[float, ...] = ()) -> Activation:
    """The activation of this name; `learned` are its numbers where it has some."""
    return LEARNED[name].make(*learned) if name in LEARNED else ACTIVATIONS[name]
