"""SparseLLM on small FFNs: invariances, published special cases, and that closing the loop helps."""

import pytest
import torch

from secateur.core.activations import ACTIVATIONS
from secateur.core.feedforward import Affine, FeedForward
from secateur.core.pattern import Stacked, Unstructured
from secateur.core.solvers import ADMM, SparseGPT
from secateur.core.sparsellm import (
    Patterns,
    SparseLLM,
    closed_feedforward,
    first_inputs,
    first_weights,
    output_error,
    with_down,
    with_first,
)
from secateur.core.sparsellm_paper import paper_feedforward

D, K = 12, 32


def ffn(activation="silu", gated=True, bias=False, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)

    def affine(R, C):
        return Affine(
            torch.randn(R, C, generator=g, dtype=dtype) / C**0.5,
            torch.randn(R, generator=g, dtype=dtype) if bias else None,
        )

    return FeedForward(affine(K, D), affine(D, K), affine(K, D) if gated else None, ACTIVATIONS[activation])


def tokens(dense, T=600, chunks=3, seed=1, rank=D):
    g = torch.Generator().manual_seed(seed)
    dtype = dense.up.W.dtype
    mixing = torch.randn(rank, D, generator=torch.Generator().manual_seed(7), dtype=dtype) / rank**0.5
    X = torch.randn(T, rank, generator=g, dtype=dtype) @ mixing
    return [(x, dense(x)) for x in X.chunk(chunks)]


def patterns(sparsity=0.6, gated=True):
    pattern = Unstructured(sparsity)
    return Patterns(Stacked(((K, pattern),) * (2 if gated else 1)), pattern)


def start(dense, chunks, solver, sparsity=0.6):
    """Iteration 0 of the paper: the solver on every matrix, on the dense network's inputs."""
    p = patterns(sparsity, dense.gate is not None)
    hidden = torch.cat([dense.hidden(x) for x, _ in chunks])
    first = solver.solve(first_weights(dense), first_inputs(dense, chunks).H, p.first)
    down = solver.solve(dense.down.W, hidden.T @ hidden / len(hidden), p.down)
    return with_down(with_first(dense, first.W), down.W)


def paper(dense, chunks, solver=None, **options):
    solver = solver or SparseGPT()
    made = SparseLLM(mode="paper", **options)
    first = start(dense, chunks, solver)
    return paper_feedforward(dense, first, chunks, patterns(gated=dense.gate is not None), made, solver)


FORMS = [("silu", True, False), ("gelu_tanh", True, True), ("relu", False, True), ("gelu", False, True)]


@pytest.mark.parametrize(("activation", "gated", "bias"), FORMS)
def test_only_the_ratios_of_the_penalties_matter(activation, gated, bias):
    dense = ffn(activation, gated, bias)
    chunks = tokens(dense)
    one, five = (paper(dense, chunks, iterations=3, alpha=k, beta=2 * k, gamma=3 * k) for k in (1.0, 8.0))
    torch.testing.assert_close(first_weights(one.ffn), first_weights(five.ffn))
    torch.testing.assert_close(one.ffn.down.W, five.ffn.down.W)


@pytest.mark.parametrize(("activation", "gated", "bias"), FORMS)
def test_chunks_do_not_matter(activation, gated, bias):
    dense = ffn(activation, gated, bias)
    few, many = tokens(dense, chunks=1), tokens(dense, chunks=7)
    a, b = paper(dense, few, iterations=3), paper(dense, many, iterations=3)
    torch.testing.assert_close(a.ffn.down.W, b.ffn.down.W)
    torch.testing.assert_close(first_weights(a.ffn), first_weights(b.ffn))


@pytest.mark.parametrize(("activation", "gated", "bias"), FORMS)
def test_paper_keeps_the_last_iterate_and_counts_it(activation, gated, bias):
    dense = ffn(activation, gated, bias)
    result = paper(dense, tokens(dense), iterations=4)
    assert [r.chosen for r in result.rounds] == [False, False, False, True]
    assert all(r.objective is not None and r.objective >= 0 for r in result.rounds[1:])
    for W, count in ((result.ffn.up.W, K * D), (result.ffn.down.W, K * D)):
        assert (W == 0).sum() == round(0.6 * count)


@pytest.mark.parametrize("solver", [SparseGPT(), ADMM()], ids=["sparsegpt", "admm"])
@pytest.mark.parametrize(("activation", "gated", "bias"), FORMS)
def test_closed_loop_beats_the_inner_solver(activation, gated, bias, solver):
    dense = ffn(activation, gated, bias)
    train, held = tokens(dense, T=2000), tokens(dense, T=400, chunks=1, seed=9)
    options = SparseLLM(inner=solver)
    closed = closed_feedforward(dense, train, held, patterns(gated=gated), options, solver)
    base = output_error(start(dense, train, solver), held)
    chosen = next(r for r in closed.rounds if r.chosen)
    assert chosen.error < base
    assert chosen.error == min(r.error for r in closed.rounds)
    assert closed.rounds[0].iteration == 0
    assert output_error(closed.ffn, held) == pytest.approx(chosen.error)


@pytest.mark.parametrize("mode", ["paper", "closed"])
@pytest.mark.parametrize(("rank", "T"), [(3, 600), (D, 1)], ids=["rank deficient", "a single token"])
def test_poor_data_stays_finite(mode, rank, T):
    dense = ffn(dtype=torch.float32)
    chunks = tokens(dense, T=T, chunks=1, rank=rank)
    if mode == "paper":
        result = paper(dense, chunks, iterations=3)
    else:
        result = closed_feedforward(dense, chunks, chunks, patterns(), SparseLLM(), SparseGPT())
    assert torch.isfinite(first_weights(result.ffn)).all()
    assert torch.isfinite(result.ffn.down.W).all()


def test_dead_neurons_stay_finite():
    dense = ffn("relu", gated=False, bias=True, dtype=torch.float32)
    dense.up.b[:8] = -1e4
    result = paper(dense, tokens(dense), iterations=3)
    assert torch.isfinite(result.ffn.down.W).all()


@pytest.mark.parametrize("options", [{"iterations": 0}, {"alpha": 0.0}, {"gamma": -1.0}, {"fit_damp": -0.1}])
def test_bad_options(options):
    with pytest.raises(ValueError, match=r"must be|at least 1"):
        SparseLLM(**options)
