"""SparseLLM (arXiv:2402.17946) as published, in streaming form: what ``mode="paper"`` of ``core.sparsellm`` does.

Iteration 0 is the inner solver on every linear, then T - 1 rounds refit and re-prune the FFN's matrices on auxiliary
variables; the last iterate is kept. z and s of all tokens are carried from round to round.

T = tokens of a chunk, D = hidden size, K = inner size of the FFN.
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from secateur.core.feedforward import (
    ActivationStep,
    Auxiliary,
    FeedForward,
    activated,
    chunk_objective,
    gradient_step,
    newton_step,
    pre_activations,
    stacked,
    update_auxiliary,
)
from secateur.core.linalg import fit
from secateur.core.moments import Combine, CrossMoments, Gram, Observed, Totals, alone
from secateur.core.solver import LayerSolver
from secateur.core.sparsellm import (
    SLICE,
    Patterns,
    Refined,
    Round,
    SparseLLM,
    Tokens,
    first_inputs,
    first_weights,
    fitted,
    output_error,
    with_down,
    with_first,
)

GATE_STEPS = {"gauss-newton": newton_step, "gradient": gradient_step}
PAPER_DAMP = 0.01
"""Ridge in place of the published pseudo-inverse, which inverts rounding noise; the published damping of H."""


class FitSums(NamedTuple):
    """What the next least-squares fits need of all tokens."""

    first: Float[Tensor, "R D"]
    """Residual cross moments of the first matrices, gate over up: (target - X W0ᵀ)ᵀ X / tokens."""
    down: Float[Tensor, "D K"]
    down_inputs: Observed
    objective: float
    """F per token."""


def paper_feedforward(
    dense: FeedForward,
    pruned: FeedForward,
    tokens: Tokens,
    patterns: Patterns,
    options: SparseLLM,
    solver: LayerSolver,
    combine: Combine = alone,
) -> Refined:
    """The published rounds, one at least, from iteration 0's ``pruned`` FFN (the solver on every matrix alone) to the
    last iterate.

    z and s start from the dense network and are carried from round to round, as is H of the first matrices.
    ``combine`` as in closed mode.
    """
    inputs = first_inputs(dense, tokens, combine)
    carried = [pre_activations(dense, X) for X, _ in tokens]
    ffn, sums, note, W0 = pruned, None, "", dense.down.W
    rounds = [Round(0, None, output_error(pruned, tokens, combine), chosen=False)]
    for t in range(1, options.iterations):
        carried, sums = update_tokens(dense, ffn, tokens, carried, options, combine)
        H, G = inputs.H, sums.down_inputs.H
        first = solver.solve(fit(first_weights(dense), H, sums.first, PAPER_DAMP), H, patterns.first)
        down = solver.solve(fit(W0, G, sums.down, PAPER_DAMP), G, patterns.down)
        ffn, note = with_down(with_first(ffn, first.W), down.W), first.note or down.note
        last = t == options.iterations - 1
        rounds.append(Round(t, sums.objective, output_error(ffn, tokens, combine), last))
    assert sums is not None, "one iteration is the inner solver, which needs none of this"
    return Refined(ffn, tuple(rounds), inputs, fitted(W0, ffn.down.W, sums.down_inputs), note)


def update_tokens(
    dense: FeedForward,
    ffn: FeedForward,
    tokens: Tokens,
    carried: list[Auxiliary],
    options: SparseLLM,
    combine: Combine = alone,
) -> tuple[list[Auxiliary], FitSums]:
    """One pass over the tokens: p, then z, then s of every chunk, and the moments of the fits that follow."""
    D, K = dense.down.W.shape
    W0, device, dtype = first_weights(dense), dense.down.W.device, dense.down.W.dtype
    step = ActivationStep(ffn.down.W, options.penalties)
    gate_step = GATE_STEPS[options.gate_step]
    gram, down = Gram.zeros(K, device, dtype), CrossMoments.zeros(D, K, device, dtype)
    first = CrossMoments.zeros(W0.shape[0], W0.shape[1], device, dtype)
    updated: list[Auxiliary] = []
    objective = Totals.zeros(1, device)
    for (X, Y), old in zip(tokens, carried, strict=True):
        realised, Y = pre_activations(ffn, X), ffn.down.without_bias(Y)
        p = step(activated(ffn, old), Y)
        new = update_auxiliary(ffn, realised, p, old, options.penalties, gate_step, SLICE)
        updated.append(new)
        gram.update(p)
        down.update(Y - p @ dense.down.W.T, p)
        first.update(stacked(new) - stacked(pre_activations(dense, X)), X)
        objective.sum += chunk_objective(ffn, realised, Y, p, new, options.penalties)
    for moments in (gram, down, first, objective):
        combine(moments)
    return updated, FitSums(first.mean(), down.mean(), gram.observed(), float(objective.sum) / gram.tokens)
