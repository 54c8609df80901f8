"""Ranges of activations in pieces, and scales in which 0 has a code of its own."""

import pytest
import torch

from secateur.core.int8 import LEVELS, Extremes, input_step


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
