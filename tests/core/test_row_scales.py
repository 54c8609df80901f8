"""Scales of rows and groups: against autograd, in both layouts."""

import pytest
import torch

from secateur.core.row_scales import check_groups, group_sums, scaled, spread


@pytest.mark.parametrize("transposed", [False, True], ids=["R x C", "C x R"])
@pytest.mark.parametrize("n", [1, 2, 6])
def test_gradients_are_the_chain_rules(n, transposed):
    generator = torch.Generator().manual_seed(0)
    W, G = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    A = torch.rand(3, n, generator=generator, dtype=torch.float64)
    if transposed:
        W, G, A = W.T.contiguous(), G.T.contiguous(), A.T.contiguous()
    leaf_W, leaf_A = W.clone().requires_grad_(), A.clone().requires_grad_()
    (scaled(leaf_W, leaf_A) * G).sum().backward()
    assert torch.allclose(leaf_W.grad, G * spread(A, W.shape))
    assert torch.allclose(leaf_A.grad, group_sums(W * G, A))


def test_by_hand():
    W, A = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[10.0, 0.5]])
    assert scaled(W, A).tolist() == [[10.0, 20.0, 1.5, 2.0]]
    assert group_sums(W, A).tolist() == [[3.0, 7.0]]
    assert scaled(W, None) is W


def test_groups_must_divide():
    check_groups(6, 0)
    check_groups(6, 3)
    with pytest.raises(ValueError, match="scales 4 wants in_features divisible by 4, got 6; choose a divisor"):
        check_groups(6, 4)
