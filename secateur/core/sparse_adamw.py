"""Adam for matrices that are trained sparse: the arithmetic of one step, for every method, and its schedules.

The dense master weights W live in the optimizer, and what the model computes with is made from them after every step
(AST, arXiv:2407.20584; design in docs/training.md). The gradient g is that of the loss at the model's weights, so it
reaches pruned weights too: the straight-through estimator, exactly, with no autograd function. While the mask moves,
pruned weights decay towards zero, weakly at first and then strongly (annealing), so that a weight that does not prove
itself stops coming back.

Methods differ in where the decay enters and in what the second moment sees:

    ast     u = m + lambda * pruned * W;  v sees u² (as published: near a minimum sqrt((1 + beta1) / (1 - beta1)),
            4.4 at 0.9, times the step of Adam at the same rate)
    ast_g   the same u;  v sees g² (of pruned weights g² + (lambda W)²): for kept weights this is Adam at Adam's rates
    srste   g + lambda * pruned * W enters both moments (SR-STE, arXiv:2102.04010)
    cast    the model computes with dense W; m is drawn towards lambda * sign(W) on pruned weights, ever more so, until
            W is made sparse for the last part (CAST, arXiv:2509.25996, its AdamS; its row scales: ``row_scales``)
    admm    the model computes with dense W; u = m + lambda (W - Z + U), of the augmented Lagrangian of "the least loss
            of a sparse W". At a refresh Z becomes the sparse part of W + U and U what that leaves (ELSA,
            arXiv:2510.01650). Once the mask is frozen, fixed
    fixed   Adam on the kept weights; the mask stays as it was
    none    Adam; nothing is pruned

The published GPT-2 code decays the wrong weights (bitwise not of an integer mask) and lets them grow; masks are bool.

Functions whose names end in "_" change their state in place, as an optimizer must: a copy of the moments of seven
billion weights is 56 GB. One step reads g and reads and writes W, m and v: 28 bytes a weight and a few passes.

W, m, v, g: any shape, here that of a matrix (R = out_features, C = in_features). Masks are bool, True = kept.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from secateur.core.row_scales import scaled


class Weights(NamedTuple):
    """What the optimizer holds of one parameter, in float32. Changed in place."""

    W: Float[Tensor, "..."]
    """Dense master weights."""
    m: Float[Tensor, "..."]
    """First moment."""
    v: Float[Tensor, "..."]
    """Second moment."""
    keep: Bool[Tensor, "..."] | None = None
    """The mask; None where nothing is pruned."""
    inputs: Float[Tensor, "..."] | None = None
    """Mean square of every input of the matrix, (C,), or (C, 1) beside a W stored as (C, R); None = not known yet."""
    scale: Float[Tensor, "..."] | None = None
    """Row scales A: the model computes with A ⊙ W. None = none."""
    split: Float[Tensor, "..."] | None = None
    """ADMM's W + U at the last refresh: Z where it is kept (U is 0 there), U where it is pruned (Z is 0 there)."""
    penalty: float = 0.0
    """ADMM's lambda since then."""
    fisher: Float[Tensor, "..."] | None = None
    """Average of g², where v is another one and a metric asks for it."""


@dataclass(frozen=True)
class Step:
    """The numbers of one step."""

    number: int
    """From 1."""
    lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled (AdamW), on all weights."""
    decay: float = 0.0
    """lambda of this step: the pull of pruned weights towards zero."""
    progress: float = 0.0
    """Steps done as a share of all, CAST's alpha."""


Update = Callable[[Weights, Float[Tensor, "..."], Step], None]


def adamw_(held: Weights, g: Float[Tensor, "..."], step: Step) -> None:
    """AdamW (arXiv:1711.05101): none, and parameters without a mask."""
    held.W.mul_(1 - step.lr * step.weight_decay)
    held.m.lerp_(g, 1 - step.beta1)
    _move_(held, held.m, g, step)


def fixed_(held: Weights, g: Float[Tensor, "..."], step: Step) -> None:
    """The same, without the gradient of pruned weights."""
    adamw_(held, g * _kept(held), step)


def ast_(held: Weights, g: Float[Tensor, "..."], step: Step) -> None:
    """AST as published: the decay is not accumulated in m, and v sees what moves the weights."""
    held.W.mul_(1 - step.lr * step.weight_decay)
    held.m.lerp_(g, 1 - step.beta1)
    u = held.m + step.decay * pruned_part(held)
    _move_(held, u, u, step)


def ast_g_(held: Weights, g: Float[Tensor, "..."], step: Step) -> None:
    """AST with Adam's own second moment; it sees the decay too, or pruned weights without a gradient would explode."""
    held.W.mul_(1 - step.lr * step.weight_decay)
    held.m.lerp_(g, 1 - step.beta1)
    pull = step.decay * pruned_part(held)
    _move_(held, held.m + pull, g.hypot(pull), step)


def srste_(held: Weights, g: Float[Tensor, "..."], step: Step) -> None:
    """The decay is a part of the gradient."""
    adamw_(held, g + step.decay * pruned_part(held), step)


def cast_(held: Weights, g: Float[Tensor, "..."], step: Step) -> None:
    """AdamS: (1 - alpha) m + alpha lambda sign(W) on pruned weights, with alpha the progress; v sees it."""
    held.W.mul_(1 - step.lr * step.weight_decay)
    held.m.lerp_(g, 1 - step.beta1)
    drawn = torch.lerp(held.m, step.decay * held.W.sign(), step.progress)
    u = torch.where(_kept(held), held.m, drawn)
    _move_(held, u, u, step)


def admm_(held: Weights, g: Float[Tensor, "..."], step: Step) -> None:
    """ADMM's step towards the least loss near Z - U (ELSA, Algorithm 1), by Adam.

    m and v are of the loss alone: a ``Relative`` lambda measures m, and v is the Fisher diagonal of the metric. The
    penalty's pull is exact, not an average, and enters the denominator, so that it alone moves W by lr at most. The
    public code adds it to g before Adam; by ``fisher`` a pruned weight then scores by its own pull.
    """
    held.W.mul_(1 - step.lr * step.weight_decay)
    held.m.lerp_(g, 1 - step.beta1)
    held.v.mul_(step.beta2).addcmul_(g, g, value=1 - step.beta2)
    split = _split(held)
    pull = held.penalty * (held.W - torch.where(_kept(held), split, -split))
    root = (held.v / (1 - step.beta2**step.number)).addcmul_(pull, pull).sqrt_().add_(step.eps)
    held.W.addcdiv_(held.m / (1 - step.beta1**step.number) + pull, root, value=-step.lr)


def dual_(held: Weights, penalty: float) -> None:
    """U takes in W - Z, before a new mask says which part of W + U is the new Z. lambda U outlives another lambda."""
    split = _split(held)
    U = torch.where(_kept(held), 0.0, split) * (held.penalty / penalty if penalty else 1.0)
    split.copy_(held.W + U)


MethodName = Literal["ast", "ast_g", "srste", "cast", "admm", "fixed", "none"]
UPDATES: dict[str, Update] = {
    "ast": ast_,
    "ast_g": ast_g_,
    "srste": srste_,
    "cast": cast_,
    "admm": admm_,
    "fixed": fixed_,
    "none": adamw_,
}
ONCE_FROZEN: dict[str, Update] = {"admm": fixed_}
"""What those that are another method with a frozen mask become."""
DENSE_UNTIL_FROZEN = ("cast", "admm")
"""Methods whose model computes with all weights while the mask still moves."""
PULLED_ALIKE = ("cast",)
"""Methods that pull every pruned weight with lambda and not with lambda W, and whose pull rises without a ramp."""
PULL_IN_M = ("srste",)
"""Methods whose first moment holds the pull: lambda must not be measured on what it has itself put there."""
V_SEES_MORE = ("ast", "ast_g", "srste", "cast")
"""Methods whose second moment is not that of the gradient alone."""


def pruned_part(held: Weights) -> Float[Tensor, "..."]:
    """W where it is pruned, 0 where it is kept."""
    return torch.where(_kept(held), 0.0, held.W)


def masked(held: Weights) -> Float[Tensor, "..."]:
    """A ⊙ W where it is kept, +0.0 where it is pruned (a product with the mask would leave -0.0)."""
    return torch.where(_kept(held), dense(held), 0.0)


def dense(held: Weights) -> Float[Tensor, "..."]:
    """A ⊙ W."""
    return scaled(held.W, held.scale)


def _kept(held: Weights) -> Bool[Tensor, "..."]:
    if held.keep is None:
        raise ValueError("this update needs a mask; use adamw_ for parameters that are not pruned")
    return held.keep


def _split(held: Weights) -> Float[Tensor, "..."]:
    if held.split is None:
        raise ValueError("admm needs the sum of W and U; give Weights a split, a copy of W in the beginning")
    return held.split


def _move_(held: Weights, u: Float[Tensor, "..."], seen: Float[Tensor, "..."], step: Step) -> None:
    """v takes in ``seen``²; W goes lr u / (sqrt(v) + eps), both corrected for their start at zero."""
    held.v.mul_(step.beta2).addcmul_(seen, seen, value=1 - step.beta2)
    root = held.v.sqrt().div_(math.sqrt(1 - step.beta2**step.number)).add_(step.eps)
    held.W.addcdiv_(u, root, value=-step.lr / (1 - step.beta1**step.number))


# ------------------------------------------------------------------------------------------------------------ schedules


RAMPS: dict[str, Callable[[float], float]] = {
    "linear": lambda share: share,
    "cosine": lambda share: (1 - math.cos(math.pi * share)) / 2,
}


@dataclass(frozen=True)
class Schedule:
    """When what happens in a training of ``steps`` optimizer steps. Shares are of all steps."""

    steps: int
    refresh: int = 10
    """Steps between two choices of the mask."""
    anneal: float = 0.25
    """Share in which the decay rises from zero; then it stays."""
    sparsify: float = 0.0
    """Share in which the sparsity rises cubically to the pattern's own; 0 is at once. N:M is at once always."""
    freeze: float = 0.8
    """Share after which the mask stays; the dense weights of CAST and ADMM become sparse there."""
    ramp: str = "linear"
    """How the decay rises, a key of ``RAMPS``: AST's line, or half a wave of a cosine."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.refresh < 1:
            raise ValueError(f"steps and refresh must be at least 1, got {self.steps} and {self.refresh}")
        for name in ("anneal", "sparsify", "freeze"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share of all steps, in [0, 1]; got {getattr(self, name)}")
        if self.ramp not in RAMPS:
            raise ValueError(f"ramp {self.ramp!r} is unknown; use one of {', '.join(RAMPS)}")
        if self.sparsify > self.freeze:
            raise ValueError(f"sparsify ({self.sparsify}) must end before the mask is frozen ({self.freeze})")

    def annealed(self, number: int) -> float:
        """Share of the full decay in step ``number`` (from 1): AST's Eq. 3."""
        return RAMPS[self.ramp](min(1.0, number / (self.anneal * self.steps))) if self.anneal else 1.0

    def progress(self, number: int) -> float:
        return min(1.0, number / self.steps)

    def refreshes(self, number: int) -> bool:
        """Whether the mask is chosen anew after step ``number``; the last time when it is about to be frozen."""
        last = self._count(self.freeze)
        return number == last or (number < last and number % self.refresh == 0)

    def frozen(self, number: int) -> bool:
        """Whether the mask of step ``number`` is the final one."""
        return number > self._count(self.freeze)

    def sparsity_reached(self, number: int) -> float:
        """How far along its rise the sparsity is, for ``pattern.ramped``; 1 where it has arrived."""
        return min(1.0, number / max(1, self._count(self.sparsify))) if self.sparsify else 1.0

    def _count(self, share: float) -> int:
        """Whole steps of a share: 63 of 90 at 0.7, though the product of these two is a little less."""
        return int(share * self.steps + 1e-9)


def rate(number: int, steps: int, highest: float, warmup: float, final: float) -> float:
    """Learning rate of step ``number`` (from 1): up for the share ``warmup``, down along a cosine to ``final``.

    A function of the number alone, so that a run that goes on needs nothing but where it stands.
    """
    rising = round(warmup * steps)
    if number <= rising:
        return highest * number / rising
    gone = (number - rising) / (steps - rising)
    return highest * (final + (1 - final) * (1 + math.cos(math.pi * gone)) / 2)


Norm = Callable[[Float[Tensor, "..."]], Float[Tensor, ""]]
"""Of a whole matrix, of which a process may hold some rows: who knows the other processes passes it in."""


@dataclass(frozen=True)
class Absolute:
    """The decay as published: one number for all matrices."""

    value: float
    """lambda. AST used 1e-4 for GPT-2 and 6e-5 for Llama-2-7B, at their scales of loss and weights."""

    def of(self, held: Weights, method: str, norm: Norm = torch.linalg.vector_norm) -> float:
        return self.value


@dataclass(frozen=True)
class Relative:
    """lambda = c rms(m) / rms(W) of each matrix: a pruned weight of average size is pulled c times as hard as by m.

    Where all are pulled alike that is lambda = c rms(m), and m is that of kept weights where it holds the pull on the
    others. Free of the scale of loss and weights. Too small lets masks oscillate, too large does little harm.
    """

    c: float = 3.0
    """The published absolute values come to 1 to 3."""

    def of(self, held: Weights, method: str, norm: Norm = torch.linalg.vector_norm) -> float:
        size, m = float(norm(held.W.sign() if method in PULLED_ALIKE else held.W)), float(norm(held.m))
        if method in PULL_IN_M and held.keep is not None:
            kept = held.keep.float()
            m = float(norm(held.m * kept)) * float(norm(torch.ones_like(kept))) / max(float(norm(kept)), 1.0)
        return self.c * m / size if size > 0 else 0.0


Decay = Absolute | Relative


def flipped(before: Bool[Tensor, "..."], after: Bool[Tensor, "..."]) -> Integer[Tensor, ""]:
    """How many entries of the mask changed."""
    return (before != after).sum()


# -------------------------------------------------------------------------------------------------------------- metrics


def by_magnitude(held: Weights, step: Step) -> Float[Tensor, "..."]:
    """|A W|: what AST found best."""
    return dense(held).abs()


def by_fisher(held: Weights, step: Step) -> Float[Tensor, "..."]:
    """W² mean(g²): what the loss loses to second order with the diagonal Fisher matrix as the Hessian (ELSA's weight).

    No scale is missing: g is the gradient at W, A times that at A W.
    """
    return held.W.square() * (held.v if held.fisher is None else held.fisher)


def by_taylor(held: Weights, step: Step) -> Float[Tensor, "..."]:
    """|W m|: what the loss changes by to first order when the weight goes (Molchanov et al., arXiv:1906.10771)."""
    return (held.W * held.m).abs()


def by_wanda(held: Weights, step: Step) -> Float[Tensor, "..."]:
    """|A W| sqrt(mean x²) (Wanda, arXiv:2306.11695); |A W| of a matrix that no input has reached yet."""
    return dense(held).abs() if held.inputs is None else dense(held).abs() * held.inputs.sqrt()


Metric = Callable[[Weights, Step], Float[Tensor, "..."]]
MetricName = Literal["magnitude", "fisher", "taylor", "wanda"]
METRICS: dict[str, Metric] = {
    "magnitude": by_magnitude,
    "fisher": by_fisher,
    "taylor": by_taylor,
    "wanda": by_wanda,
}
NEED_INPUTS = ("wanda",)
"""Metrics that want to know what the matrix is multiplied with."""
INPUT_MEMORY = 0.9
"""Share of the sums of squared inputs that stays from step to step: a window of ten steps, as a mask lasts."""
