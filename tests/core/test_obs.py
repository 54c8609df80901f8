"""The two-level column sweep against the naive loop of the paper, written out."""

import pytest
import torch

from secateur.core.linalg import inverse_cholesky
from secateur.core.obs import obs_sweep
from secateur.core.pattern import NM, Unstructured, keep_mask


def naive_sweep(W, U, pattern, column_block, every):
    W, mask = W.clone(), torch.ones_like(W, dtype=torch.bool)
    for j in range(W.shape[1]):
        width = every if every < column_block else column_block
        if j % width == 0:
            columns = slice(j, min(j + width, W.shape[1]))
            mask[:, columns] = keep_mask(W[:, columns].square() / U.diagonal()[columns].square(), pattern, j)
        error = torch.where(mask[:, j], 0.0, W[:, j]) / U[j, j]
        W[:, j + 1 :] -= torch.outer(error, U[j, j + 1 :])
    return W * mask, mask


@pytest.mark.parametrize(
    ("pattern", "column_block", "every"),
    [
        (Unstructured(0.6), 32, 32),
        (Unstructured(0.6), 40, 40),
        (Unstructured(0.5, "row"), 96, 96),
        (NM(2, 4), 32, 4),
        (NM(3, 8), 96, 8),
        (NM(8, 32), 64, 32),
    ],
    ids=str,
)
def test_equals_the_naive_loop(problem, pattern, column_block, every):
    W, _, H = problem(R=20, C=96, T=400)
    W, H = W.double(), H.double()
    U, _ = inverse_cholesky(H, 0.01)
    swept, mask = obs_sweep(
        W, U, lambda w, u, start: keep_mask(w.square() / u.square(), pattern, start), column_block, every
    )
    expected, expected_mask = naive_sweep(W, U, pattern, column_block, every)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(swept * mask, expected, rtol=1e-9, atol=1e-9)
