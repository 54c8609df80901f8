"""The contract of every layer solver: pattern exact, zeros exact, arguments untouched, deterministic."""

import itertools

import pytest
import torch

from secateur.core.pattern import NM, Block, Stacked, Unstructured, check_mask
from secateur.core.solver import relative_error
from secateur.core.solvers import ADMM, SOLVERS, Magnitude, SparseGPT, Wanda
from secateur.errors import NumericalError

SOLVED_BY = [Magnitude(), Wanda(), SparseGPT(column_block=8), ADMM(iterations=8, ramp=6)]  # add yours here
PATTERNS = [
    Unstructured(0.0),
    Unstructured(0.5),
    Unstructured(0.83),
    Unstructured(0.7, "row"),
    NM(2, 4),
    NM(1, 4),
    NM(3, 8),
    Block(0.5, 2, 4),
]


def name(value):
    return type(value).__name__ if type(value).__module__.startswith("secateur.core.solvers") else str(value)


@pytest.mark.parametrize(("solver", "pattern"), list(itertools.product(SOLVED_BY, PATTERNS)), ids=name)
def test_contract(problem, solver, pattern):
    W, _, H = problem()
    W_before, H_before = W.clone(), H.clone()
    first, again = solver.solve(W, H, pattern), solver.solve(W, H, pattern)
    assert torch.equal(W, W_before)
    assert torch.equal(H, H_before)
    assert torch.equal(first.W, again.W)
    assert torch.equal(first.mask, again.mask)
    assert first.mask.dtype == torch.bool
    assert check_mask(first.mask, pattern) is None
    assert (first.W[~first.mask] == 0).all()
    assert not torch.signbit(first.W[~first.mask]).any()
    assert torch.isfinite(first.W).all()
    assert first.W.dtype == W.dtype


@pytest.mark.parametrize("solver", SOLVED_BY, ids=name)
def test_stacked_matrices_keep_their_own_counts(problem, solver):
    W, _, H = problem(R=12)
    parts = Stacked(((4, Unstructured(0.25)), (8, Unstructured(0.75))))
    mask = solver.solve(W, H, parts).mask
    assert mask[:4].sum() == 48
    assert mask[4:].sum() == 32


@pytest.mark.parametrize("solver", SOLVED_BY, ids=name)
def test_zero_sparsity_changes_nothing_that_matters(problem, solver):
    W, _, H = problem()
    assert relative_error(W, solver.solve(W, H, Unstructured(0.0)).W, H) < 1e-6


@pytest.mark.parametrize("solver", SOLVED_BY, ids=name)
@pytest.mark.parametrize("rank", [1, 15], ids=["single direction", "LayerNorm-like"])
def test_rank_deficient_inputs(problem, solver, rank):
    W, _, H = problem(rank=rank)
    pruned = solver.solve(W, H, Unstructured(0.5))
    assert torch.isfinite(pruned.W).all()
    assert relative_error(W, pruned.W, H) < 1


@pytest.mark.parametrize("solver", [SparseGPT(), ADMM()], ids=name)
def test_dead_inputs_are_pruned_first(problem, solver):
    W, X, _ = problem()
    X[:, [3, 7]] = 0
    mask = solver.solve(W, X.T @ X / len(X), Unstructured(0.5)).mask
    assert not mask[:, [3, 7]].any()


@pytest.mark.parametrize("pattern", [Unstructured(0.3), Unstructured(0.6), NM(2, 4)], ids=str)
@pytest.mark.parametrize("dead", [2, 8, 24])
def test_admm_is_as_good_beside_dead_inputs(problem, dead, pattern):
    W, X, _ = problem(R=24, C=32, T=400)
    where = torch.randperm(32, generator=torch.Generator().manual_seed(0))[:dead]
    X[:, where] = 0
    H = X.T @ X / len(X)
    pruned = ADMM().solve(W, H, pattern).W
    assert relative_error(W, pruned, H) < 1.02 * relative_error(W, SparseGPT().solve(W, H, pattern).W, H) + 1e-6
    assert pruned[:, where].abs().max() <= 1.01 * W.abs().max()


@pytest.mark.parametrize("solver", [SparseGPT(), ADMM()], ids=name)
def test_inputs_that_are_all_zero_are_an_error_not_an_identity(solver):
    with pytest.raises(NumericalError, match="every calibration input"):
        solver.solve(torch.ones(4, 4), torch.zeros(4, 4), Unstructured(0.5))


@pytest.mark.parametrize("solver", [SparseGPT(), ADMM()], ids=name)
def test_scaling_the_inputs_changes_no_mask(problem, solver):
    W, _, H = problem()
    assert torch.equal(solver.solve(W, H, NM(2, 4)).mask, solver.solve(W, 1024 * H, NM(2, 4)).mask)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7), NM(2, 4)], ids=str)
def test_better_solvers_lose_less(problem, pattern):
    """Magnitude > Wanda > SparseGPT > ADMM in lost output energy, on the mean of some problems."""
    errors = []
    for solver in (Magnitude(), Wanda(), SparseGPT(), ADMM()):
        cases = [problem(R=32, C=32, T=400, seed=seed) for seed in range(4)]
        errors.append(sum(relative_error(W, solver.solve(W, H, pattern).W, H) for W, _, H in cases))
    assert errors == sorted(errors, reverse=True)


def test_admm_approaches_the_best_weights_under_its_mask(problem):
    W, _, H = problem(R=6, T=400)
    solver = ADMM(iterations=400, ramp=5, damp=0.0)
    pruned = solver.solve(W, H, Unstructured(0.5, "row"))
    for w0, w, kept in zip(W, pruned.W, pruned.mask, strict=True):  # dense algebra, row by row
        best = torch.linalg.solve(H[kept][:, kept], (w0 @ H)[kept])
        torch.testing.assert_close(w[kept], best, rtol=2e-2, atol=2e-2)


def test_sparsegpt_compensates_as_the_closed_form_says(problem):
    """With one column pruned and all to its right free, the sweep must find the exact least-squares weights."""
    W, _, H = (tensor.double() for tensor in problem(R=3, T=400))
    first_column_gone = Block(1 / 16, 3, 1)
    W[:, 0] *= 1e-3  # the cheapest column is the first one
    pruned = SparseGPT(damp=0.0, column_block=16).solve(W, H, first_column_gone)
    assert not pruned.mask[:, 0].any()
    best = torch.linalg.solve(H[1:, 1:], (W @ H)[:, 1:].T).T
    torch.testing.assert_close(pruned.W[:, 1:], best, rtol=1e-3, atol=1e-3)


def test_table_of_names_is_complete():
    assert set(SOLVERS.values()) == {type(solver) for solver in SOLVED_BY}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SparseGPT(damp=-1.0), "damp must be >= 0"),
        (lambda: ADMM(iterations=3, ramp=4), "ramp must lie"),
        (lambda: ADMM(rho=0.0), "rho must be"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()
