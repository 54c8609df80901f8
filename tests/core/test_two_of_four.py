"""2:4 matrices packed and unpacked; the places as torch.sparse counts them."""

import pytest
import torch

from secateur.core.pattern import NM, keep_mask
from secateur.core.two_of_four import first_broken_row, pack
from secateur.models.sparse24_loader import unpack


def two_of_four(rows: int, columns: int, dtype: torch.dtype, pattern: NM) -> torch.Tensor:
    W = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    return (W * keep_mask(W.abs(), pattern)).to(dtype)


def test_a_row_by_eye():
    values, places = pack(torch.tensor([[5, 0, 0, 6, 0, 0, 7, 0]]))
    assert values.tolist() == [[5, 6, 0, 7]]
    assert places.tolist() == [[(0 + 4 * 3) + 16 * (0 + 4 * 2)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4)])
def test_there_and_back(dtype, pattern):
    W = two_of_four(6, 48, torch.float32, pattern)
    W[0] = 0
    W = (9 * W).to(dtype)
    values, places = pack(W)
    assert (values.shape, places.shape, values.dtype, places.dtype) == ((6, 24), (6, 6), dtype, torch.uint8)
    assert torch.equal(unpack(values, places), W)


def test_a_negative_zero_comes_back_as_zero():
    values, places = pack(torch.tensor([[-0.0, 1.0, 0.0, 0.0, -0.0, 0.0, 0.0, -0.0]]))
    assert not torch.signbit(values).any()
    assert not torch.signbit(unpack(values, places)).any()


def test_sixteen_bits_become_nine():
    values, places = pack(two_of_four(8, 64, torch.bfloat16, NM(2, 4)))
    assert 8 * (values.nbytes + places.nbytes) == 9 * 8 * 64


def test_values_are_those_of_torch_sparse():
    """Its conversion for CUTLASS keeps the same values in the same order; its metadata are in the hardware's."""
    from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

    W = two_of_four(64, 128, torch.bfloat16, NM(2, 4))
    theirs, _ = sparse_semi_structured_from_dense_cutlass(W)
    assert torch.equal(pack(W)[0], theirs)


def test_what_is_not_two_of_four():
    W = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0]])
    assert first_broken_row(W) == 1
    with pytest.raises(ValueError, match="not 2:4: row 1 has more than 2 non-zeros"):
        pack(W)
    with pytest.raises(ValueError, match="multiple of 8 weights, got 12"):
        pack(torch.zeros(2, 12))
