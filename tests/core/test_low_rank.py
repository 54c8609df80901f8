"""Low-rank branches: group sums are kept, the fit is the best of its rank, costs are counted."""

import pytest
import torch

from secateur.core.low_rank import Branch, group_mean, residual_fit
from secateur.core.pattern import NM, keep_mask


def weighted_fit(lost, H, rank):
    """EoRA: what is lacking is the lost weights, lost H of the output in the fit's own metric."""
    return residual_fit(lost @ (H + 0.01 * H.diagonal().mean() * torch.eye(len(H))), H, rank)


def pruned(R=12, C=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(R, C, generator=generator)
    inputs = torch.randn(200, C, generator=generator) @ torch.randn(C, C, generator=generator)
    return W, keep_mask(W.abs(), NM(2, 4)), inputs.T @ inputs / 200


@pytest.mark.parametrize("k", [1, 4, 16])
def test_group_sums_of_weights_are_kept(k):
    W, mask, _ = pruned()
    branch = group_mean(W, mask, k)
    assert branch.X.shape == (16 // k, 16)
    both = W * mask + branch.product
    assert torch.allclose(both.view(12, -1, k).sum(2), W.view(12, -1, k).sum(2), atol=1e-5)


def test_the_indicator_is_readable():
    W, mask, _ = pruned(2, 4)
    assert group_mean(W, mask, 2).X.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_the_group_mean_is_the_least_squares_fit_of_what_was_pruned():
    W, mask, _ = pruned()
    branch = group_mean(W, mask, 4)
    best = torch.linalg.lstsq(branch.X.T, (W * ~mask).T).solution.T
    assert torch.allclose(branch.S, best, atol=1e-5)


def error(lost, branch, H):
    left = lost - branch.product
    return torch.trace(left @ H @ left.T).item()


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_no_branch_of_its_rank_is_better(rank):
    W, mask, H = pruned()
    lost = W * ~mask
    ridged = H + 0.01 * H.diagonal().mean() * torch.eye(16)
    fitted = weighted_fit(lost, H, rank)
    least = error(lost, fitted, ridged)
    generator = torch.Generator().manual_seed(1)
    anywhere = torch.randn(12, rank, generator=generator), torch.randn(rank, 16, generator=generator)
    for start in ((fitted.S, fitted.X), anywhere):
        S, X = (factor.clone(memory_format=torch.contiguous_format).requires_grad_() for factor in start)
        optimizer = torch.optim.LBFGS([S, X], max_iter=200, line_search_fn="strong_wolfe")

        def closure(S=S, X=X, optimizer=optimizer):
            optimizer.zero_grad()
            left = lost - S @ X
            loss = torch.trace(left @ ridged @ left.T)
            loss.backward()
            return loss

        optimizer.step(closure)
        assert error(lost, Branch(S.detach(), X.detach()), ridged) >= least * (1 - 1e-3)
    assert error(lost, fitted, ridged) < error(lost, Branch(0 * fitted.S, fitted.X), ridged)


def test_for_uncorrelated_inputs_it_is_the_truncated_svd():
    W, mask, _ = pruned()
    lost = W * ~mask
    U, sigma, Vt = torch.linalg.svd(lost, full_matrices=False)
    expected = U[:, :4] * sigma[:4] @ Vt[:4]
    assert torch.allclose(weighted_fit(lost, torch.eye(16), 4).product, expected, atol=1e-4)


def test_full_rank_loses_nothing_and_more_rank_is_never_worse():
    W, mask, H = pruned()
    lost = W * ~mask
    assert torch.allclose(weighted_fit(lost, H, 12).product, lost, atol=1e-3)
    errors = [error(lost, weighted_fit(lost, H, rank), H) for rank in (1, 4, 8, 12)]
    assert errors == sorted(errors, reverse=True)


def test_what_an_output_lacks_is_fitted_by_reduced_rank_regression():
    """Of every rank: the truncated ridge regression, and never worse than nothing on the tokens themselves."""
    generator = torch.Generator().manual_seed(3)
    X, E = torch.randn(300, 16, generator=generator), torch.randn(300, 12, generator=generator)
    E += X @ torch.randn(16, 2, generator=generator) @ torch.randn(2, 12, generator=generator)
    H, residual = X.T @ X / 300, E.T @ X / 300
    before, errors = E.square().sum(), []
    for rank in (1, 2, 8, 12):
        branch = residual_fit(residual, H, rank)
        errors.append((E - X @ branch.product.T).square().sum())
    assert before > errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[1] < 0.4 * before, "two directions were planted"
    ridged = H + 0.01 * H.diagonal().mean() * torch.eye(16)
    assert torch.allclose(residual_fit(residual, H, 12).product, torch.linalg.solve(ridged, residual.T).T, atol=1e-4)


def test_what_it_costs():
    """A square matrix at 2:4 and rank C / 16: a quarter of the survivors, as the paper's 12.5 % of all weights."""
    mask = keep_mask(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), NM(2, 4))
    branch = group_mean(torch.randn(64, 64), mask, 16)
    assert branch.size == 2 * 64 * 4
    assert branch.size == mask.sum() / 4


def test_what_cannot_be():
    W, mask, H = pruned()
    with pytest.raises(ValueError, match="k to divide in_features, got k = 5 and 16"):
        group_mean(W, mask, 5)
    for rank in (0, 13):
        with pytest.raises(ValueError, match=rf"must lie in 1..12 .*got {rank}"):
            residual_fit(W, H, rank)
