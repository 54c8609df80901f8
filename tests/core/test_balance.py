"""Balancing: powers of two, ranges evened out, and less lost in rounding inputs whose channels differ."""

import pytest
import torch

from secateur.core.balance import power_of_two, searched, smoothing
from secateur.core.grid import Scheme, fit_grid, on_grid
from secateur.core.solver import relative_error


def test_powers_of_two():
    assert power_of_two(torch.tensor([0.9, 1.3, 1.5, 3.1, 1e9, 1e-9])).tolist() == [1, 1, 2, 4, 256, 2**-8]


def test_smoothing_is_the_formula_and_leaves_unused_channels_alone():
    inputs, weights = torch.tensor([16.0, 1.0, 0.0, 4.0, 1.0]), torch.tensor([1.0, 1.0, 3.0, 0.0, 1.0])
    assert smoothing(inputs, weights).tolist() == [4, 1, 1, 1, 1]
    assert smoothing(inputs, weights, strength=1.0).tolist() == [16, 1, 1, 1, 1]
    assert smoothing(torch.zeros(3), torch.ones(3)).tolist() == [1, 1, 1]


def outliers(seed, R=32, C=64, T=400):
    """Some channels of the inputs 30 times as large as others."""
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(T, C, generator=g)
    X[:, ::16] *= 30
    return torch.randn(R, C, generator=g), X


def test_smoothed_inputs_lose_less_on_an_8_bit_grid():
    def loss(X, W):
        s = X.abs().amax(dim=1, keepdim=True) / 127
        return float((((X / s).round() * s - X) @ W.T).square().sum())

    for seed in range(4):
        W, X = outliers(seed)
        s = smoothing(X.abs().amax(dim=0), W.abs().amax(dim=0))
        assert loss(X / s, W * s) < 0.5 * loss(X, W)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 32), Scheme(3, 64, False)], ids=Scheme.words)
def test_searched_scales_never_lose_more_than_none(scheme):
    def lost(W, s, H):
        return relative_error(W, on_grid(W * s, fit_grid(W * s, scheme, H.diagonal() / s.square()), scheme) / s, H)

    before, after = [], []
    for seed in range(4):
        W, X = outliers(seed)
        X *= torch.logspace(-1, 1, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(seed))]
        H = X.T @ X / len(X)
        s = searched(W, H, scheme)
        assert torch.equal(s, power_of_two(s))
        before.append(lost(W, torch.ones(64), H))
        after.append(lost(W, s, H))
    assert all(a <= b for a, b in zip(after, before, strict=True))
    assert sum(after) < sum(before)


def test_where_there_is_nothing_to_gain_nothing_is_scaled():
    W, _ = outliers(0)
    assert (searched(W, torch.eye(64), Scheme(4, 32)) == 1).all()
    assert (searched(W, torch.zeros(64, 64), Scheme(4, 32)) == 1).all()
