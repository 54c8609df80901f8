"""SparseLLM's token-wise updates against brute force, grids and the h x h inverse they avoid."""

import itertools

import pytest
import torch

from secateur.core.activations import ACTIVATIONS, activation
from secateur.core.feedforward import (
    ActivationStep,
    Affine,
    Auxiliary,
    FeedForward,
    Penalties,
    activated,
    anchored_step,
    gradient_step,
    newton_step,
    pre_activations,
    relu_step,
    stacked,
    up_step,
    update_auxiliary,
)

PENALTIES = [Penalties(1.0, 1.0, 1.0), Penalties(0.1, 5.0, 1.0), Penalties(100.0, 0.1, 10.0)]


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("penalties", PENALTIES)
@pytest.mark.parametrize("rank", [6, 3], ids=["full rank", "dead outputs"])
def test_activation_step_equals_the_inverse_form(penalties, rank):
    """(beta WᵀW + gamma I)⁻¹ (beta WᵀY + gamma a), eq. 3, with its K x K inverse written out."""
    W, a, Y = random(6, 20), random(50, 20, seed=1), random(50, 6, seed=2)
    W[rank:] = 0
    left = penalties.beta * W.T @ W + penalties.gamma * torch.eye(20, dtype=torch.float64)
    expected = torch.linalg.solve(left, (penalties.beta * Y @ W + penalties.gamma * a).T).T
    torch.testing.assert_close(ActivationStep(W, penalties)(a, Y), expected)


@pytest.mark.parametrize("penalties", PENALTIES)
def test_relu_step_equals_brute_force(penalties):
    m, p = random(4000, scale=2), random(4000, seed=1, scale=2)

    def cost(z):
        return penalties.alpha * (z - m) ** 2 + penalties.gamma * (p - z.clamp(min=0)) ** 2

    candidates = [((penalties.alpha * m + penalties.gamma * p) / (penalties.alpha + penalties.gamma)).clamp(min=0)]
    candidates.append(m.clamp(max=0))
    best = torch.stack([cost(z) for z in candidates]).min(dim=0).values
    grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]
    found = cost(relu_step(m[:, None].T, p[:, None].T, penalties)[0])
    torch.testing.assert_close(found, best)
    assert (found <= cost(grid).min(dim=0).values + 1e-9).all()


@pytest.mark.parametrize("penalties", PENALTIES)
def test_up_step_is_the_minimum(penalties):
    m, g, p = random(1, 500), random(1, 500, seed=1), random(1, 500, seed=2)
    z = up_step(m, g, p, penalties).requires_grad_()
    cost = penalties.alpha * (z - m) ** 2 + penalties.gamma * (p - g * z) ** 2
    (slope,) = torch.autograd.grad(cost.sum(), z)
    assert slope.abs().max() < 1e-9 * max(penalties)


def gate_cost(s, q, p, z, phi, penalties):
    return penalties.alpha * (s - q) ** 2 + penalties.gamma * (p - z * phi.f(s)) ** 2


@pytest.mark.parametrize(
    ("name", "scale"), list(itertools.product(["silu", "gelu", "gelu_tanh", "relu", "relu2"], [1.0, 10.0, 100.0]))
)
def test_newton_never_increases_the_objective(name, scale):
    phi, penalties = ACTIVATIONS[name], Penalties(1.0, 1.0, 1.0)
    q, z, p = random(20, 100, scale=3), random(20, 100, seed=1, scale=scale), random(20, 100, seed=2, scale=scale)
    s, before = q, gate_cost(q, q, p, z, phi, penalties)
    for _ in range(4):
        s = newton_step(q, p, z, s, phi, penalties, iterations=1)
        after = gate_cost(s, q, p, z, phi, penalties)
        assert (after <= before).all()
        before = after
    assert after.mean() < 0.75 * gate_cost(q, q, p, z, phi, penalties).mean()


def test_newton_finds_the_grid_optimum_where_there_is_one_basin():
    phi, penalties = ACTIVATIONS["silu"], Penalties(1.0, 1.0, 1.0)
    q, z, p = random(1, 300), random(1, 300, seed=1), random(1, 300, seed=2)
    s = newton_step(q, p, z, q, phi, penalties, iterations=6)
    grid = torch.linspace(-8, 8, 8001, dtype=torch.float64)[:, None, None]
    best = gate_cost(grid, q, p, z, phi, penalties).min(dim=0).values
    assert gate_cost(s, q, p, z, phi, penalties).mean() <= 1.02 * best.mean()


def test_the_published_gate_step_diverges_where_newton_does_not():
    phi, penalties = ACTIVATIONS["silu"], Penalties(5.0, 5.0, 5.0)
    q, z, p = random(20, 100), random(20, 100, seed=1, scale=10), random(20, 100, seed=2, scale=10)
    start = gate_cost(q, q, p, z, phi, penalties).mean()
    assert gate_cost(gradient_step(q, p, z, q, phi, penalties), q, p, z, phi, penalties).mean() > 10 * start
    assert gate_cost(newton_step(q, p, z, q, phi, penalties), q, p, z, phi, penalties).mean() < start


@pytest.mark.parametrize("alpha", [1.0, 5.0, 0.1])
def test_the_published_step_depends_on_ratios_of_penalties_alone(alpha):
    """Two times s <- s - 0.1 [(s - q) - z phi'(s) (p - z phi(s))], which is published for alpha = gamma = 5."""
    phi = ACTIVATIONS["silu"]
    s, q, p, z = (random(20, 10, seed=seed) for seed in range(4))
    stepped = gradient_step(q, p, z, s, phi, Penalties(alpha, 1.0, alpha))
    for _ in range(2):
        s = s - 0.1 * ((s - q) - z * phi.df(s) * (p - z * phi.f(s)))
    torch.testing.assert_close(stepped, s)


def test_a_plain_ffn_uses_the_same_newton_step():
    phi, penalties = ACTIVATIONS["relu"], Penalties(1.0, 1.0, 1.0)
    m, p = random(1, 500), random(1, 500, seed=1)
    exact = gate_cost(relu_step(m, p, penalties), m, p, 1.0, phi, penalties)
    stepped = gate_cost(newton_step(m, p, 1.0, m, phi, penalties), m, p, 1.0, phi, penalties)
    assert (stepped >= exact - 1e-12).all()


@pytest.mark.parametrize("penalties", PENALTIES)
def test_activation_change_is_the_step_and_what_it_leaves(penalties):
    W, a, Y = random(6, 20), random(50, 20, seed=1), random(50, 6, seed=2)
    step = ActivationStep(W, penalties)
    change, p = step.change(a, Y), step(a, Y)
    torch.testing.assert_close(change.activation, p - a)
    torch.testing.assert_close(change.left, Y - p @ W.T)


def small_ffn(name, gated):
    gate = Affine(random(12, 6, seed=3)) if gated else None
    return FeedForward(Affine(random(12, 6, seed=4)), Affine(random(6, 12, seed=5)), gate, ACTIVATIONS[name])


@pytest.mark.parametrize("penalties", PENALTIES)
@pytest.mark.parametrize(("name", "gated"), [("silu", True), ("gelu_tanh", True), ("gelu", False)])
def test_anchored_step_minimises_the_linearised_coupling(penalties, name, gated):
    """Against the 1 or 2 unknowns of every element solved as a least-squares problem of its own."""
    ffn = small_ffn(name, gated)
    realised = pre_activations(ffn, random(9, 6))
    r = random(9, 12, seed=1)
    moves, cost = anchored_step(ffn, realised, r, penalties, slice=4)
    unknowns = stacked(realised).clone().requires_grad_()
    (slopes,) = torch.autograd.grad(activated(ffn, unstacked(unknowns, gated)).sum(), unknowns)
    slopes = slopes.view(9, -1, 12)
    normal = penalties.alpha * torch.eye(slopes.shape[1]) + penalties.gamma * torch.einsum(
        "tik,tjk->tkij", slopes, slopes
    )
    expected = torch.linalg.solve(normal, penalties.gamma * torch.einsum("tik,tk->tki", slopes, r)[..., None])[..., 0]
    torch.testing.assert_close(moves, expected.transpose(1, 2).reshape(9, -1))
    left = (r - (slopes * expected.transpose(1, 2)).sum(dim=1)).square().sum()
    assert cost == pytest.approx(float(penalties.alpha * expected.square().sum() + penalties.gamma * left))


def test_anchored_step_of_relu_is_its_exact_step():
    ffn, penalties = small_ffn("relu", gated=False), PENALTIES[1]
    realised, r = pre_activations(ffn, random(9, 6)), random(9, 12, seed=1)
    moves, cost = anchored_step(ffn, realised, r, penalties, slice=4)
    p = activated(ffn, realised) + r
    moved = relu_step(realised.z, p, penalties)
    torch.testing.assert_close(moves, moved - realised.z)
    expected = penalties.alpha * (moved - realised.z).square() + penalties.gamma * (p - moved.relu()).square()
    assert cost == pytest.approx(float(expected.sum()))


def unstacked(values, gated):
    s, z = values.split(12, dim=1) if gated else (None, values)
    return Auxiliary(z, s)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", ["relu", "silu"])
def test_a_slice_of_tokens_at_a_time_is_all_of_them(name, gated):
    def matrix(*shape, seed):
        return Affine(random(*shape, seed=seed), None)

    gate = matrix(16, 6, seed=3) if gated else None
    ffn = FeedForward(matrix(16, 6, seed=1), matrix(6, 16, seed=2), gate, activation(name))
    realised, target = pre_activations(ffn, random(37, 6)), random(37, 16, seed=4)
    whole, sliced = (
        update_auxiliary(ffn, realised, target, realised, PENALTIES[1], newton_step, slice=n) for n in (1000, 8)
    )
    torch.testing.assert_close(sliced.z, whole.z)
    assert (sliced.s is None) == (whole.s is None) == (not gated)
    torch.testing.assert_close(sliced.s, whole.s)
