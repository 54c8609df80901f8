"""A feed-forward network seen as mathematics, and SparseLLM's token-wise updates of its auxiliary variables.

SparseLLM (arXiv:2402.17946) prunes the matrices of an FFN jointly. It gives every token auxiliary variables - z for the
up projection's output, s for the gate's, p for the down projection's input - and minimises

    F = alpha |z - up(X)|² + alpha |s - gate(X)|² + gamma |p - phi(s) z|² + beta |Y - down(p)|²        (eq. 5)

over one group of unknowns at a time. Given p, z and s, the matrices are pruned least-squares fits (``core.linalg.fit``
and any layer solver). Given the matrices, every token is independent of every other, and each variable has a closed
form or a scalar Newton step; those are the functions of this file. Only the ratios of alpha, beta and gamma matter.

Without a gate, z is the pre-activation itself: p ~ phi(z).

T = tokens, D = hidden size, K = inner size of the FFN (h in the paper).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.activations import Activation
from secateur.core.linalg import cholesky


class Affine(NamedTuple):
    """y = x Wᵀ + b."""

    W: Float[Tensor, "R C"]
    b: Float[Tensor, " R"] | None = None

    def __call__(self, X: Float[Tensor, "T C"]) -> Float[Tensor, "T R"]:
        return X @ self.W.T if self.b is None else torch.addmm(self.b, X, self.W.T)

    def without_bias(self, Y: Float[Tensor, "T R"]) -> Float[Tensor, "T R"]:
        """Y minus the bias: what W alone has to produce."""
        return Y if self.b is None else Y - self.b


class FeedForward(NamedTuple):
    """down(phi(up(x))), or down(phi(gate(x)) * up(x)) with a gate."""

    up: Affine
    down: Affine
    gate: Affine | None
    activation: Activation

    def hidden(self, X: Float[Tensor, "T D"]) -> Float[Tensor, "T K"]:
        """The input of the down projection."""
        if self.gate is None:
            return self.activation.f(self.up(X))
        return self.activation.f(self.gate(X)) * self.up(X)

    def __call__(self, X: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        return self.down(self.hidden(X))


class Penalties(NamedTuple):
    """Weights of the three kinds of terms of F."""

    alpha: float
    """On the first matrices: z = up(X), s = gate(X)."""
    beta: float
    """On the down projection: Y = down(p)."""
    gamma: float
    """On the activation: p = phi(s) z."""


class Change(NamedTuple):
    """How the activation step moves a token."""

    activation: Float[Tensor, "T K"]
    """p - a."""
    left: Float[Tensor, "T D"]
    """Y - W p: what stays unexplained of the output."""


class ActivationStep:
    """argmin over p of gamma |p - a|² + beta |Y - W p|² for many tokens: one D x D factorisation, then products.

    p = a + beta Wᵀ K⁻¹ (Y - W a) with K = gamma I + beta W Wᵀ: the push-through form of
    (beta WᵀW + gamma I)⁻¹(beta WᵀY + gamma a) (eq. 3), which would need a K x K inverse.
    """

    def __init__(self, W: Float[Tensor, "D K"], penalties: Penalties) -> None:
        eye = torch.eye(W.shape[0], device=W.device, dtype=W.dtype)
        L = cholesky(penalties.gamma * eye + penalties.beta * (W @ W.T), damp=0.0).L
        self._W = W
        self._back = penalties.beta * torch.cholesky_solve(W, L)  # beta K⁻¹ W
        self._left = penalties.gamma * torch.cholesky_inverse(L)  # Y - W p = gamma K⁻¹ (Y - W a)

    def __call__(self, a: Float[Tensor, "T K"], Y: Float[Tensor, "T D"]) -> Float[Tensor, "T K"]:
        return torch.addmm(a, Y - a @ self._W.T, self._back)

    def change(self, a: Float[Tensor, "T K"], Y: Float[Tensor, "T D"]) -> "Change":
        """p - a, and what p leaves of Y."""
        lost = Y - a @ self._W.T
        return Change(lost @ self._back, lost @ self._left)


def relu_step(m: Float[Tensor, "T K"], p: Float[Tensor, "T K"], penalties: Penalties) -> Float[Tensor, "T K"]:
    """argmin over z of alpha (z - m)² + gamma (p - max(z, 0))², exactly (eq. 4 and its complete case list)."""
    alpha, gamma = penalties.alpha, penalties.gamma
    reach = (1 + gamma / alpha) ** 0.5 - 1
    active = (m >= 0) | ((p > 0) & (-m <= p * reach))
    return torch.where(active, ((alpha * m + gamma * p) / (alpha + gamma)).clamp(min=0), m)


def up_step(
    m: Float[Tensor, "T K"], g: Float[Tensor, "T K"], p: Float[Tensor, "T K"], penalties: Penalties
) -> Float[Tensor, "T K"]:
    """argmin over z of alpha (z - m)² + gamma (p - g z)² with g = phi(s) (eq. 5 of research notes; exact)."""
    alpha, gamma = penalties.alpha, penalties.gamma
    return (alpha * m + gamma * g * p) / (alpha + gamma * g.square())


def newton_step(
    q: Float[Tensor, "T K"],
    p: Float[Tensor, "T K"],
    z: Float[Tensor, "T K"] | float,
    start: Float[Tensor, "T K"],
    activation: Activation,
    penalties: Penalties,
    iterations: int = 2,
) -> Float[Tensor, "T K"]:
    """Lower alpha (s - q)² + gamma (p - z phi(s))², elementwise, by damped Gauss-Newton from ``start``.

    With r = p - z phi(s) and J = z phi'(s) the step is (alpha (s - q) - gamma J r) / (alpha + gamma J²), a descent
    direction since the denominator is at least alpha. It is shortened 4, 16, 64-fold where the objective would rise,
    and not taken where even that does not help: the objective never increases. (The published two gradient steps of
    fixed length diverge once |z phi'(s)| exceeds about 4.) z = 1 is the FFN without a gate.
    """
    alpha, gamma = penalties.alpha, penalties.gamma

    def cost(s: Tensor, q: Tensor, p: Tensor, z: Tensor | float) -> Tensor:
        return alpha * (s - q).square() + gamma * (p - z * activation.f(s)).square()

    s, best = start, cost(start, q, p, z)
    for _ in range(iterations):
        J = z * activation.df(s)
        step = (alpha * (s - q) - gamma * J * (p - z * activation.f(s))) / (alpha + gamma * J.square())
        trial = s - step
        value = cost(trial, q, p, z)
        failed = (~(value <= best)).nonzero(as_tuple=True)  # a NaN fails too
        trial[failed], value[failed] = _shortened(s, step, best, failed, lambda t, i: cost(t, q[i], p[i], _at(z, i)))
        s, best = trial, value
    return s


def _at(z: Tensor | float, index: tuple[Tensor, ...]) -> Tensor | float:
    return z[index] if isinstance(z, Tensor) else z


def _shortened(
    s: Float[Tensor, "T K"],
    step: Float[Tensor, "T K"],
    best: Float[Tensor, "T K"],
    index: tuple[Tensor, ...],
    cost: Callable[[Tensor, tuple[Tensor, ...]], Tensor],
) -> tuple[Float[Tensor, " failed"], Float[Tensor, " failed"]]:
    """For the few elements whose full step failed: the longest of the shorter steps that does not raise the cost."""
    start, full, value = s[index], step[index], best[index]
    chosen, best_so_far = start, value
    todo = torch.ones_like(start, dtype=torch.bool)
    for length in (1 / 4, 1 / 16, 1 / 64):
        trial = start - length * full
        trial_value = cost(trial, index)
        good = todo & (trial_value <= best_so_far)
        chosen, value = torch.where(good, trial, chosen), torch.where(good, trial_value, value)
        todo &= ~good
    return chosen, value


def gradient_step(
    q: Float[Tensor, "T K"],
    p: Float[Tensor, "T K"],
    z: Float[Tensor, "T K"],
    start: Float[Tensor, "T K"],
    activation: Activation,
    penalties: Penalties,
    iterations: int = 2,
    rate: float = 0.05,
) -> Float[Tensor, "T K"]:
    """The published gate step: ``iterations`` plain gradient steps of fixed length. Diverges on real gated FFNs.

    Published is a rate of 0.01 at alpha = gamma = 5. The slope is that of the cost over alpha here, the rate five times
    as large: the same there, and everywhere else a step that depends on the ratio alone.
    """
    s, weight = start, penalties.gamma / penalties.alpha
    for _ in range(iterations):
        slope = 2 * (s - q) - 2 * weight * z * activation.df(s) * (p - z * activation.f(s))
        s = s - rate * slope
    return s


class Auxiliary(NamedTuple):
    """The auxiliary variables of one chunk of tokens, or the realised pre-activations that they start from."""

    z: Float[Tensor, "T K"]
    s: Float[Tensor, "T K"] | None
    """None without a gate."""


def pre_activations(ffn: FeedForward, X: Float[Tensor, "T D"]) -> Auxiliary:
    """Outputs of the first matrices."""
    return Auxiliary(ffn.up(X), ffn.gate(X) if ffn.gate else None)


def activated(ffn: FeedForward, aux: Auxiliary) -> Float[Tensor, "T K"]:
    """phi(s) z, or phi(z) without a gate."""
    return ffn.activation.f(aux.z) if aux.s is None else ffn.activation.f(aux.s) * aux.z


def stacked(aux: Auxiliary) -> Float[Tensor, "T R"]:
    """s beside z, in the order of the stacked first matrices."""
    return aux.z if aux.s is None else torch.cat([aux.s, aux.z], dim=1)


def update_auxiliary(
    ffn: FeedForward,
    realised: Auxiliary,
    p: Float[Tensor, "T K"],
    old: Auxiliary,
    penalties: Penalties,
    gate_step: Callable[..., Tensor],
    slice: int,
) -> Auxiliary:
    """z by its closed form (Newton for a plain FFN whose phi is not ReLU), then s of a gated one.

    ``slice`` tokens at a time: dozens of elementwise passes, which then stay in the cache.
    """
    parts = []
    for i in range(0, len(p), slice):
        now, before = (
            Auxiliary(aux.z[i : i + slice], None if aux.s is None else aux.s[i : i + slice]) for aux in (realised, old)
        )
        parts.append(_updated(ffn.activation, now, p[i : i + slice], before, penalties, gate_step))
    s = None if realised.s is None else torch.cat([part.s for part in parts])
    return Auxiliary(torch.cat([part.z for part in parts]), s)


def _updated(
    activation: Activation,
    realised: Auxiliary,
    p: Float[Tensor, "T K"],
    old: Auxiliary,
    penalties: Penalties,
    gate_step: Callable[..., Tensor],
) -> Auxiliary:
    if realised.s is None or old.s is None:
        if activation.name == "relu":
            return Auxiliary(relu_step(realised.z, p, penalties), None)
        return Auxiliary(newton_step(realised.z, p, 1.0, old.z, activation, penalties), None)
    z = up_step(realised.z, activation.f(old.s), p, penalties)
    return Auxiliary(z, gate_step(realised.s, p, z, old.s, activation, penalties))


def anchored_step(
    ffn: FeedForward, realised: Auxiliary, r: Float[Tensor, "T K"], penalties: Penalties, slice: int
) -> tuple[Float[Tensor, "T R"], float]:
    """How s and z (stacked) move one Gauss-Newton step from realised, to follow the activation by r = p - a; the cost.

    argmin over (ds, dz) of alpha (ds² + dz²) + gamma (r - J ds - g dz)² (eq. 5 linearised), J = z phi'(s), g = phi(s):
    both are their slope times w = gamma r / (alpha + gamma (J² + g²)), at the cost of alpha r w. Without a gate there
    is J = phi'(z) only; ReLU, which has no slope where it is off, takes its exact step. ``slice`` tokens at a time.
    """
    moves, costs = [], []
    for i in range(0, len(r), slice):
        z, s = realised.z[i : i + slice], None if realised.s is None else realised.s[i : i + slice]
        move, cost = _anchored_moves(ffn.activation, z, s, r[i : i + slice], penalties)
        moves.append(move)
        costs.append(cost.sum())
    return torch.cat(moves), float(torch.stack(costs).sum())


def _anchored_moves(
    activation: Activation,
    z: Float[Tensor, "T K"],
    s: Float[Tensor, "T K"] | None,
    r: Float[Tensor, "T K"],
    penalties: Penalties,
) -> tuple[Float[Tensor, "T R"], Float[Tensor, "T K"]]:
    """Changes and costs of one slice."""
    alpha, gamma = penalties.alpha, penalties.gamma
    if s is None and activation.name == "relu":
        a = activation.f(z)
        moved = relu_step(z, a + r, penalties)
        return moved - z, alpha * (moved - z).square() + gamma * (a + r - activation.f(moved)).square()
    if s is None:
        J = activation.df(z)
        w = r / (alpha / gamma + J.square())
        return J * w, alpha * r * w
    g, J = activation.f(s), z * activation.df(s)
    w = r / torch.addcmul(torch.addcmul(torch.full_like(g, alpha / gamma), J, J), g, g)
    return torch.cat([J * w, g * w], dim=1), alpha * r * w


def chunk_objective(
    ffn: FeedForward,
    realised: Auxiliary,
    Y: Float[Tensor, "T D"],
    p: Float[Tensor, "T K"],
    aux: Auxiliary,
    penalties: Penalties,
) -> float:
    """F of one chunk; Y without the down projection's bias."""
    first = (stacked(aux) - stacked(realised)).square().sum()
    coupling = (p - activated(ffn, aux)).square().sum()
    output = (Y - p @ ffn.down.W.T).square().sum()
    return float(penalties.alpha * first + penalties.gamma * coupling + penalties.beta * output)
