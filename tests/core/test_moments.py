"""Streaming moments: chunks and dtypes give what one product gives."""

from dataclasses import replace

import pytest
import torch

from secateur.core.moments import ColumnNorms, CrossMoments, Gram, inputs_of

X = torch.randn(3, 20, 8, generator=torch.Generator().manual_seed(0))
Z = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(1))
FLAT, FLAT_Z = X.reshape(-1, 8), Z.reshape(-1, 5)


def test_gram_of_chunks_equals_one_product():
    gram = Gram.zeros(8)
    for chunk in X:
        gram.update(chunk)
    assert gram.tokens == 60
    torch.testing.assert_close(gram.mean(), FLAT.T @ FLAT / 60)


def test_column_norms_are_the_diagonal():
    norms, gram = ColumnNorms.zeros(8), Gram.zeros(8)
    norms.update(X)
    gram.update(X)
    torch.testing.assert_close(norms.mean(), gram.mean().diagonal())


def test_cross_moments():
    cross = CrossMoments.zeros(5, 8)
    cross.update(Z[:2], X[:2])
    cross.update(Z[2:], X[2:])
    torch.testing.assert_close(cross.mean(), FLAT_Z.T @ FLAT / 60)


def test_sixteen_bit_inputs_are_summed_in_float32():
    gram = Gram.zeros(1)
    for _ in range(3000):
        gram.update(torch.ones(1, 1, dtype=torch.bfloat16))  # a bfloat16 sum would stop at 256
    assert gram.sum.item() == 3000


def test_no_tokens_give_zeros_not_nan():
    assert Gram.zeros(2).mean().tolist() == [[0, 0], [0, 0]]


def test_what_moments_tell_of_their_inputs():
    X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X[:, 2] = 0
    X[:, 4] *= 100
    gram, norms = Gram.zeros(6, dtype=torch.float64), ColumnNorms.zeros(6, dtype=torch.float64)
    gram.update(X)
    norms.update(X)
    told, of_norms = inputs_of(gram.observed()), inputs_of(norms.observed())
    assert (told.tokens, told.columns, told.dead) == (40, 6, 1)
    assert told.dimension == pytest.approx(1, abs=0.01), "one column carries nearly all of the energy"
    assert told.largest == pytest.approx(float(X.square().sum(0).max() / X.square().sum(0).median()))
    assert of_norms == replace(told, dimension=None)


def test_the_dimension_is_that_of_equal_directions():
    gram = Gram(torch.diag(torch.tensor([3.0, 3, 3, 0, 0, 0])), 3)
    assert inputs_of(gram.observed()).dimension == pytest.approx(3)
    assert inputs_of(gram.observed()).largest is None
    assert inputs_of(Gram.zeros(4).observed()).dimension is None


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("chunk", [1000, 4096])
def test_chunks_and_threads_change_the_seventh_digit(chunk, threads):
    X = torch.randn(4096, 300, generator=torch.Generator().manual_seed(0)) + 0.5
    exact = X.double().T @ X.double() / len(X)
    gram, before = Gram.zeros(300), torch.get_num_threads()
    torch.set_num_threads(threads)
    for rows in X.split(chunk):
        gram.update(rows)
    torch.set_num_threads(before)
    assert float((gram.mean() - exact).norm() / exact.norm()) < 1e-6
