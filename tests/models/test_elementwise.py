"""A weight that scales element by element is told from a matrix by what a change of it reaches."""

import torch
from torch import nn

from secateur.models.elementwise import elementwise


class PerHead(nn.Module):
    """(tokens, heads, width) times a weight of (heads, width), or by a matrix shared by the heads."""

    def __init__(self, heads, width, matrix):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, width))
        self.matrix = matrix

    def forward(self, X):
        return X @ self.weight if self.matrix else X / X.norm(dim=-1, keepdim=True) * self.weight


def found(block, X):
    return elementwise(block, [name for name, _ in block.named_parameters()], lambda: block(X))


def test_a_norm_per_head_is_elementwise():
    X = torch.randn(5, 4, 8, generator=torch.Generator().manual_seed(0))
    assert found(nn.Sequential(PerHead(4, 8, matrix=False)), X) == {"0.weight"}


def test_a_matrix_of_the_same_shape_does_not():
    X = torch.randn(5, 4, 4, generator=torch.Generator().manual_seed(0))
    assert found(nn.Sequential(PerHead(4, 4, matrix=True)), X) == set()


def test_what_did_not_run_or_changes_the_shape_does_not():
    X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert elementwise(nn.Sequential(nn.Linear(4, 6)), ["0.weight"], lambda: None) == set()
    assert found(nn.Sequential(nn.Linear(4, 6, bias=False)), X) == set()


def test_nothing_is_left_behind():
    block = nn.Sequential(PerHead(4, 8, matrix=False))
    found(block, torch.ones(2, 4, 8))
    assert torch.equal(block[0].weight, torch.ones(4, 8))
    assert not block[0]._forward_hooks
