"""Streaming moments: chunks, merges and dtypes give what one product gives."""

import pytest
import torch

from secateur.core.moments import ColumnNorms, CrossMoments, Gram

X = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
Z = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(1))
FLAT, FLAT_Z = X.reshape(-1, 8), Z.reshape(-1, 5)


def test_gram_of_chunks_equals_one_product():
    gram = Gram.zeros(8)
    for chunk in X:
        gram.update(chunk)
    assert gram.tokens == 60
    torch.testing.assert_close(gram.mean(), FLAT.T @ FLAT / 60)


@pytest.mark.parametrize("kind", [Gram, ColumnNorms])
def test_merged_equals_concatenated(kind):
    left, right, whole = kind.zeros(8), kind.zeros(8), kind.zeros(8)
    left.update(X[:1])
    right.update(X[1:])
    whole.update(X)
    merged = left.merge(right)
    assert merged.tokens == whole.tokens
    torch.testing.assert_close(merged.mean(), whole.mean())
    assert left.tokens == 20  # merging changes neither side


def test_column_norms_are_the_diagonal():
    norms, gram = ColumnNorms.zeros(8), Gram.zeros(8)
    norms.update(X)
    gram.update(X)
    torch.testing.assert_close(norms.mean(), gram.mean().diagonal())


def test_cross_moments():
    cross, other = CrossMoments.zeros(5, 8), CrossMoments.zeros(5, 8)
    cross.update(Z[:2], X[:2])
    other.update(Z[2:], X[2:])
    torch.testing.assert_close(cross.merge(other).mean(), FLAT_Z.T @ FLAT / 60)


def test_sixteen_bit_inputs_are_summed_in_float32():
    gram = Gram.zeros(1)
    for _ in range(3000):
        gram.update(torch.ones(1, 1, dtype=torch.bfloat16))  # a bfloat16 sum would stop at 256
    assert gram.sum.item() == 3000


def test_no_tokens_give_zeros_not_nan():
    assert Gram.zeros(2).mean().tolist() == [[0, 0], [0, 0]]
