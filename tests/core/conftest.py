"""Small pruning problems with correlated inputs, for oracles and contracts."""

import pytest
import torch


def make_problem(R: int = 12, C: int = 16, T: int = 200, seed: int = 0, rank: int | None = None):
    """W (R, C), X (T, C) with channels of very different size, and H = XᵀX / T."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(rank or C, C, generator=g) * torch.logspace(-1.5, 0.5, C)
    X = torch.randn(T, rank or C, generator=g) @ mixing
    W = torch.randn(R, C, generator=g)
    return W, X, X.T @ X / T


@pytest.fixture
def problem():
    return make_problem
