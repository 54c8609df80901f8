"""Factors, the damping ladder and least squares against dense algebra in float64."""

import pytest
import torch

from secateur.core.linalg import channel_norms, cholesky, fit, inverse_cholesky
from secateur.errors import NumericalError


def test_inverse_cholesky_is_the_upper_factor_of_the_inverse(problem):
    _, _, H = problem()
    U, note = inverse_cholesky(H.double(), 0.01)
    damped = H.double() + 0.01 * H.double().diagonal().mean() * torch.eye(16, dtype=torch.float64)
    assert torch.equal(U, U.triu())
    assert note == ""
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(damped))


def test_ladder_raises_the_ridge_and_says_so():
    H = torch.diag(torch.tensor([1.0, 1.0, -0.05]))  # not positive semidefinite: 1 % of the mean does not mend it
    factor = cholesky(H, 0.01)
    assert "damping raised 10-fold" in factor.note
    torch.testing.assert_close(factor.L @ factor.L.T, H + factor.ridge * torch.eye(3))


def test_float64_is_tried_before_more_damping():
    generator = torch.Generator().manual_seed(5)
    Q, _ = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))
    H = ((Q * torch.logspace(0, -9, 64, dtype=torch.float64)) @ Q.T).float()  # definite, beyond float32's reach
    H = (H + H.T) / 2
    assert int(torch.linalg.cholesky_ex(H).info) > 0
    factor = cholesky(H, 0.0)
    assert factor.note == "factored in float64"
    assert factor.ridge == 0
    assert factor.L.dtype == torch.float32
    torch.testing.assert_close(factor.L @ factor.L.T, H)


def test_ladder_ends_in_advice():
    with pytest.raises(NumericalError, match="more calibration samples"):
        cholesky(torch.diag(torch.tensor([100.0, -99.0])), 0.01)


def test_infinite_moments_are_named():
    with pytest.raises(NumericalError, match="1 of 4 second moments are not finite"):
        cholesky(torch.tensor([[float("inf"), 0.0], [0.0, 1.0]]), 0.01)


def test_fit_is_least_squares(problem):
    W0, X, _ = (tensor.double() for tensor in problem(T=400))
    H = X.T @ X / 400
    Y = torch.randn(400, 12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    W = fit(W0, H, (Y - X @ W0.T).T @ X / 400, damp=0.0)
    torch.testing.assert_close(W, torch.linalg.lstsq(X, Y).solution.T, rtol=1e-3, atol=1e-3)


def test_fit_keeps_the_original_where_the_data_is_silent(problem):
    W0, X, _ = problem()
    X[:, 5] = 0
    Y = X @ torch.randn(16, 12, generator=torch.Generator().manual_seed(6))
    W = fit(W0, X.T @ X / 200, (Y - X @ W0.T).T @ X / 200, damp=0.01)
    torch.testing.assert_close(W[:, 5], W0[:, 5])


def test_channel_norms_of_dead_channels_are_tiny_but_not_zero():
    H = torch.diag(torch.tensor([4.0, 0.0]))
    assert channel_norms(H).tolist() == pytest.approx([2.0, 2e-6])
