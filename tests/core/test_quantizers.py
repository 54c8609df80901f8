"""RTN, GPTQ and Joint: zeros stay, values lie on the grid, and the sweep is the naive loop of the papers."""

import itertools

import pytest
import torch

from secateur.core.grid import Scheme, column_rounder, fit_grid, to_codes
from secateur.core.linalg import inverse_cholesky
from secateur.core.pattern import NM, Block, Stacked, Unstructured, check_mask, keep_mask
from secateur.core.quantizers import GPTQ, QUANTIZERS, RTN, Joint
from secateur.core.solver import relative_error
from secateur.core.solvers import SparseGPT

SCHEMES = [Scheme(8), Scheme(4, 32), Scheme(4, 64, False, torch.bfloat16), Scheme(3, 32, False), Scheme(3)]
PATTERNS = [Unstructured(0.5), Unstructured(0.7, "row"), NM(2, 4), NM(3, 8), NM(8, 32), Block(0.5, 4, 8)]
METHODS = [RTN, GPTQ, Joint]
words = Scheme.words


def label(value):
    return value.words() if isinstance(value, Scheme) else getattr(value, "__name__", str(value))


def test_table_of_names_is_complete():
    assert set(QUANTIZERS.values()) == set(METHODS)


@pytest.mark.parametrize(("cls", "scheme", "pattern"), list(itertools.product(METHODS, SCHEMES, PATTERNS)), ids=label)
def test_contract(problem, cls, scheme, pattern):
    W, _, H = problem(R=8, C=64)
    zeros = SparseGPT(column_block=8).solve(W, H, pattern)
    W_before, H_before = zeros.W.clone(), H.clone()
    first, again = cls(scheme).solve(zeros.W, H, pattern), cls(scheme).solve(zeros.W, H, pattern)
    assert torch.equal(zeros.W, W_before)
    assert torch.equal(H, H_before)
    assert torch.equal(first.W, again.W)
    assert (first.W[~zeros.mask] == 0).all(), "a zero was revived"
    assert not torch.signbit(first.W[first.W == 0]).any()
    assert check_mask(first.W != 0, pattern) is None
    assert torch.equal(first.mask, first.W != 0)
    s, z = (values.repeat_interleave(64 // values.shape[1], dim=1) for values in first.grid)
    codes = to_codes(first.W, first.grid, scheme)
    assert torch.equal((codes.float() - z) * s, first.W), "every weight lies on its grid"


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=words)
def test_joint_prunes_a_dense_matrix_to_the_pattern(problem, scheme, pattern):
    W, _, H = problem(R=8, C=64)
    assert check_mask(Joint(scheme).solve(W, H, pattern).W != 0, pattern) is None


@pytest.mark.parametrize("cls", [GPTQ, Joint])
def test_stacked_matrices_get_their_own_grids(problem, cls):
    W, _, H = problem(R=12, C=64)
    parts = Stacked(((4, NM(2, 4)), (8, NM(2, 4))))
    together = cls(Scheme(4, 32)).solve(W, H, parts)
    for rows, grid, piece in zip(W.split([4, 8]), together.grid.split([4, 8]), together.W.split([4, 8]), strict=True):
        alone = cls(Scheme(4, 32)).solve(rows, H, NM(2, 4))
        torch.testing.assert_close(alone.W, piece)
        torch.testing.assert_close(alone.grid.scale, grid.scale)


def naive(W, H, scheme, damp, choose, every):
    """Algorithm 1 of GPTQ with SparseGPT's mask, column by column; scales at the start of every group of 32."""
    U, _ = inverse_cholesky(H, damp)
    importance = H.diagonal() + damp * H.diagonal().mean()
    W, mask = W.clone(), torch.ones_like(W, dtype=torch.bool)
    for j in range(W.shape[1]):
        group = slice(j - j % 32, j - j % 32 + 32)
        if j % 32 == 0:
            kept = choose(W[:, group], U.diagonal()[group], j)
            rounded = column_rounder(fit_grid(W[:, group] * kept, scheme, importance[group]), scheme, j, W.shape[1])
        if j % every == 0:
            mask[:, j : j + every] = choose(W[:, j : j + every], U.diagonal()[j : j + every], j)
        q = rounded(W[:, j] * mask[:, j], j)
        W[:, j + 1 :] -= torch.outer((W[:, j] - q) / U[j, j], U[j, j + 1 :])
        W[:, j] = q
    return W, mask


@pytest.mark.parametrize(("pattern", "every"), [(Unstructured(0.5), 32), (NM(2, 4), 4), (NM(3, 8), 8)], ids=str)
def test_joint_equals_the_naive_loop(problem, pattern, every):
    W, _, H = (tensor.double() for tensor in problem(R=10, C=96, T=400))
    scheme = Scheme(4, 32)
    made = Joint(scheme).solve(W, H, pattern)
    expected, mask = naive(W, H, scheme, 0.01, lambda w, u, j: keep_mask(w.square() / u.square(), pattern, j), every)
    torch.testing.assert_close(made.W, expected * mask, rtol=1e-9, atol=1e-9)


def test_gptq_equals_the_naive_loop(problem):
    W, _, H = (tensor.double() for tensor in problem(R=10, C=96, T=400))
    W[:, ::3] = 0
    kept = W != 0
    expected, _ = naive(W, H, Scheme(3, 32), 0.01, lambda w, u, j: kept[:, j : j + w.shape[1]], 32)
    torch.testing.assert_close(GPTQ(Scheme(3, 32)).solve(W, H, Unstructured(0.0)).W, expected, rtol=1e-9, atol=1e-9)


def mean_error(problem, solve):
    errors = []
    for seed in range(4):
        W, _, H = problem(R=32, C=64, T=400, seed=seed)
        errors.append(relative_error(W, solve(W, H), H))
    return sum(errors) / len(errors)


@pytest.mark.parametrize("scheme", [Scheme(4, 32), Scheme(3, 64), Scheme(3, 32, False)], ids=words)
def test_gptq_loses_less_than_rounding_to_nearest(problem, scheme):
    nothing = Unstructured(0.0)
    rtn = mean_error(problem, lambda W, H: RTN(scheme).solve(W, H, nothing).W)
    assert mean_error(problem, lambda W, H: GPTQ(scheme).solve(W, H, nothing).W) < 0.9 * rtn


def test_the_joint_pass_loses_less_than_rounding_a_pruned_matrix(problem):
    scheme, pattern = Scheme(3, 32), NM(2, 4)

    def pruned_then_rounded(W, H):
        return RTN(scheme).solve(SparseGPT().solve(W, H, pattern).W, H, pattern).W

    joint = mean_error(problem, lambda W, H: Joint(scheme).solve(W, H, pattern).W)
    assert joint < mean_error(problem, pruned_then_rounded)


def test_more_bits_lose_less(problem):
    errors = [
        mean_error(problem, lambda W, H, s=scheme: GPTQ(s).solve(W, H, Unstructured(0.0)).W)
        for scheme in (Scheme(3, 32), Scheme(4, 32), Scheme(8))
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 1e-3


@pytest.mark.parametrize("cls", [GPTQ, Joint])
def test_bad_options(cls):
    with pytest.raises(ValueError, match="damp must be >= 0"):
        cls(Scheme(4, 32), damp=-1.0)
