"""W8A8 arithmetic: zeros stay zeros, 0 has a code of its own, balancing changes nothing but the rounding."""

import pytest
import torch

from secateur.core.int8 import LEVELS, Extremes, balance, input_step, row_codes


def test_codes_of_a_row():
    codes, scale = row_codes(torch.tensor([[0.0, 1.0, -2.0, 0.49 * 2 / 127], [0.0, 0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[0, 64, -127, 0], [0, 0, 0, 0]]
    assert scale[:, 0].tolist() == pytest.approx([2 / 127, 1.0])


def test_every_zero_stays_one_and_errors_are_half_a_step():
    W = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    W[W.abs() < 0.7] = 0
    codes, scale = row_codes(W)
    assert torch.equal(codes[W == 0], torch.zeros_like(codes[W == 0]))
    assert ((codes * scale - W).abs() <= scale / 2 + 1e-7).all()
    assert codes.abs().amax(1).eq(127).all()


def test_extremes_of_pieces_are_those_of_the_whole_and_hold_zero():
    X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 9.0, -9.0, 0.0])
    whole, pieces = Extremes.zeros(4), Extremes.zeros(4)
    whole.update(X)
    for piece in X:
        pieces.update(piece)
    assert torch.equal(whole.low, pieces.low)
    assert torch.equal(whole.high, pieces.high)
    assert whole.low[1] == 0
    assert whole.high[2] == 0
    assert torch.equal(whole.peak, X.abs().amax((0, 1)))


def test_balance_is_the_papers_and_leaves_empty_columns():
    found = balance(torch.tensor([16.0, 4.0, 0.0, 4.0]), torch.tensor([4.0, 1.0, 1.0, 0.0]), 0.5)
    assert found.tolist() == [2.0, 2.0, 1.0, 1.0]  # sqrt(16 / 4), sqrt(4 / 1)
    assert balance(torch.tensor([8.0]), torch.tensor([0.5]), 1.0).tolist() == [8.0]


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 2.0), (-5.0, 0.0), (0.0, 0.0)])
def test_zero_is_a_code_and_the_range_fits(low, high):
    step, zero = input_step(low, high)
    X = torch.tensor([low, 0.0, high])
    got = torch.fake_quantize_per_tensor_affine(X, step, zero, 0, LEVELS)
    assert got[1] == 0
    assert ((got - X).abs() <= step).all()


def test_a_range_without_zero():
    with pytest.raises(ValueError, match="has no 0 inside"):
        input_step(1.0, 2.0)
