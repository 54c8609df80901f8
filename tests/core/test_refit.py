"""The fit under a fixed mask against every row's own linear system."""

import pytest
import torch

from secateur.core.linalg import channel_norms
from secateur.core.refit import masked_fit


def problem(R=7, C=24, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(tokens, C, generator=generator, dtype=torch.float64) @ torch.randn(
        C, C, generator=generator, dtype=torch.float64
    )
    W0 = torch.randn(R, C, generator=generator, dtype=torch.float64)
    return W0, X.T @ X / tokens, torch.rand(R, C, generator=generator) > 0.6


def row_by_row(W0, H, mask, damp):
    norms = channel_norms(H)
    G = H / torch.outer(norms, norms) + damp * torch.eye(len(H), dtype=H.dtype)
    W = torch.zeros_like(W0)
    for w, w0, kept in zip(W, W0 * norms, mask, strict=True):
        w[kept] = torch.linalg.solve(G[kept][:, kept], (G @ w0)[kept])
    return W / norms


@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_converges_to_each_rows_own_solution(damp):
    W0, H, mask = problem()
    torch.testing.assert_close(masked_fit(W0, H, mask, damp, iterations=60), row_by_row(W0, H, mask, damp))


def test_few_iterations_are_never_worse_than_the_masked_weights_and_each_helps():
    W0, H, mask = problem(seed=1)

    def lost(W):
        return float((((W - W0) @ H) * (W - W0)).sum())

    errors = [lost(masked_fit(W0, H, mask, 0.0, iterations=n)) for n in (0, 1, 2, 5, 10)]
    assert errors[0] == pytest.approx(lost(W0 * mask))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.7 * errors[0]


def test_what_is_pruned_is_exactly_zero_and_inputs_are_untouched():
    W0, H, mask = problem(seed=2)
    mask[3] = False  # a row without weights
    H[5], H[:, 5] = 0, 0  # a dead channel
    before = W0.clone(), H.clone(), mask.clone()
    W = masked_fit(W0, H, mask, 0.1)
    assert torch.isfinite(W).all()
    assert (W[~mask] == 0).all()
    for now, then in zip((W0, H, mask), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)


def test_is_linear_in_the_target():
    W0, H, mask = problem(seed=3)
    torch.testing.assert_close(masked_fit(3 * W0, H, mask, 0.1), 3 * masked_fit(W0, H, mask, 0.1))
