"""SparseLLM (arXiv:2402.17946): prune the matrices of a feed-forward network jointly, not one by one.

Two modes. ``paper`` is the published procedure (``core.sparsellm_paper``). ``closed``, in this file, closes the loop
that the paper leaves open: the down projection is fitted to the activation that the pruned network really produces,
rounds start from realised activations, and the best iterate by true error on held-out tokens is kept, with iteration 0
always a candidate.

Everything that is needed of the tokens are Gram and cross-Gram matrices and one D x D solve per round; no
pseudo-inverse, no K x K inverse, and memory does not grow with the tokens but for X, Y and (paper mode) z and s,
which wait wherever the caller keeps them: tokens come in chunks, and a chunk is used as it is handed out.

T = tokens of a chunk, D = hidden size, K = inner size of the FFN.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.feedforward import (
    ActivationStep,
    Affine,
    FeedForward,
    Penalties,
    activated,
    anchored_step,
    pre_activations,
)
from secateur.core.linalg import channel_norms, fit, fit_change
from secateur.core.moments import Combine, CrossMoments, Gram, Inputs, Observed, Totals, alone, inputs_of
from secateur.core.pattern import Pattern, Stacked, keep_mask
from secateur.core.refit import masked_fit
from secateur.core.solver import LayerSolver, Needs, relative_error
from secateur.core.solvers import ADMM, Solver

Tokens = Sequence[tuple[Float[Tensor, "_ D"], Float[Tensor, "_ D"]]]
"""Chunks of (X, Y): inputs of the FFN and the outputs it is to have, in float32 on the device of the weights."""


DEFAULT_INNER = ADMM()


@dataclass(frozen=True)
class SparseLLM:
    """Options of the block solver."""

    needs: ClassVar[Needs] = "gram"

    inner: Solver = DEFAULT_INNER
    """Layer solver that prunes each matrix: attention, and the FFN inside every round."""
    mode: Literal["closed", "paper"] = "closed"
    """"closed" is our improved loop, "paper" the published procedure for comparison."""
    iterations: int = 3
    """Prunings of each FFN, the first one included (T in the paper); 1 = no alternating rounds."""
    alpha: float = 1.0
    """Penalty on the first matrices' outputs; only ratios of the three penalties matter."""
    beta: float = 1.0
    """Penalty on the FFN's output."""
    gamma: float = 1.0
    """Penalty on the activation."""
    gate_step: Literal["gauss-newton", "gradient"] = "gauss-newton"
    """How paper mode updates a gate's pre-activation; "gradient" is the published step, which can diverge."""
    fit_damp: float = 0.1
    """Closed mode's ridge of the least-squares fits towards the original weights, as a fraction of mean(diag H), and
    of every channel's own where the mask is given."""
    target: Literal["block", "ffn"] = "block"
    """What closed mode fits the FFN to: the dense block's output minus the pruned residual stream, or the dense FFN."""

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations counts prunings and is at least 1, got {self.iterations}")
        if min(self.alpha, self.beta, self.gamma) <= 0 or self.fit_damp < 0:
            raise ValueError("alpha, beta and gamma must be positive and fit_damp not negative")

    @property
    def penalties(self) -> Penalties:
        return Penalties(self.alpha, self.beta, self.gamma)


class Patterns(NamedTuple):
    """Patterns of the FFN's matrices."""

    first: Stacked
    """Of gate over up, stacked; of up alone without a gate."""
    down: Pattern


class Round(NamedTuple):
    """One iterate, as the records show it."""

    iteration: int
    objective: float | None
    """F per token after the token-wise updates that led to this iterate; None for iteration 0."""
    error: float
    """True relative error of the FFN's output on held-out (closed) or all (paper) tokens."""
    chosen: bool


class Fitted(NamedTuple):
    """What the record of a down projection says; its H, as wide as the FFN, is not kept for every iterate."""

    error: float
    """Relative error of the pruned matrix against the dense one on its inputs."""
    inputs: Inputs


class Refined(NamedTuple):
    """A pruned FFN, every iterate on the way, and the notes of the solver."""

    ffn: FeedForward
    rounds: tuple[Round, ...]
    first_inputs: Observed
    """Of the inputs that the first matrices were pruned for."""
    down: Fitted
    note: str = ""


def first_weights(ffn: FeedForward) -> Float[Tensor, "R D"]:
    """Gate over up, stacked: they share their input, so one Gram matrix and one solve serve both."""
    return ffn.up.W if ffn.gate is None else torch.cat([ffn.gate.W, ffn.up.W])


def with_first(ffn: FeedForward, W: Float[Tensor, "R D"]) -> FeedForward:
    """The FFN with other first matrices, from their stacked form."""
    if ffn.gate is None:
        return ffn._replace(up=Affine(W, ffn.up.b))
    rows = ffn.gate.W.shape[0]
    return ffn._replace(gate=Affine(W[:rows], ffn.gate.b), up=Affine(W[rows:], ffn.up.b))


def with_down(ffn: FeedForward, W: Float[Tensor, "D K"]) -> FeedForward:
    return ffn._replace(down=Affine(W, ffn.down.b))


def output_error(ffn: FeedForward, tokens: Iterable[tuple[Tensor, Tensor]], combine: Combine = alone) -> float:
    """|Y - ffn(X)|² / |Y|² over all chunks."""
    energies = Totals.zeros(2, ffn.down.W.device)
    for X, Y in tokens:
        energies.sum += torch.stack([(ffn(X) - Y).square().sum(), Y.square().sum()])
    combine(energies)
    lost, total = energies.sum.tolist()
    return lost / total if total > 0 else 0.0


def first_inputs(ffn: FeedForward, tokens: Tokens, combine: Combine = alone) -> Observed:
    W = ffn.up.W
    gram = Gram.zeros(W.shape[1], W.device, W.dtype)
    for X, _ in tokens:
        gram.update(X)
    combine(gram)
    return gram.observed()


COUPLING = 0.1
"""Closed mode's unit of alpha and gamma, as a fraction of mean(diag(W Wᵀ)) of the down projection: penalties of 1
mean the same whatever the scale of the weights."""
SLICE = 128
"""Tokens of a slice of elementwise work, which then stays in a processor's cache."""
STEPS = (16.0, 32.0, 4.0)
"""Over-relaxations of a round: the first, the next where it lowered the error, the next where it did not. Auxiliary
variables move only part of the way that the weights can go, the more so as down follows."""


class Iterate(NamedTuple):
    """A pruned FFN on its way."""

    ffn: FeedForward
    down: Fitted
    error: float
    """True relative error on the held-out tokens."""
    note: str


def closed_feedforward(
    dense: FeedForward,
    train: Tokens,
    held: Tokens,
    patterns: Patterns,
    options: SparseLLM,
    solver: LayerSolver,
    combine: Combine = alone,
) -> Refined:
    """Prune an FFN against targets Y: first matrices, then down on realised activations, then alternating rounds.

    Stops when a round does not lower the error on the held-out tokens; the best iterate is returned. ``combine`` makes
    every sum over tokens that of all processes, where each holds a part of them.
    """

    def closed(ffn: FeedForward, note: str) -> Iterate:
        ffn, down, down_note = solve_down(ffn, dense.down.W, train, patterns, options, solver, combine)
        return Iterate(ffn, down, output_error(ffn, held, combine), note or down_note)

    inputs = first_inputs(dense, train, combine)
    first = solver.solve(first_weights(dense), inputs.H, patterns.first)
    best = closed(with_first(dense, first.W), first.note)
    rounds = [Round(0, None, best.error, True)]
    for t in range(1, options.iterations):
        direction, objective = pull(best.ffn, inputs.H, train, options, combine)
        winner, errors = best, []
        for _ in range(2):
            target = moved(best.ffn, direction, next_step(best.error, errors), inputs.H, patterns, options)
            winner, error = better_of(winner, closed(target, best.note))
            errors.append(error)
        rounds.append(Round(t, objective, min(errors), winner is not best))
        if winner is best:
            break
        rounds[t - 1] = rounds[t - 1]._replace(chosen=False)
        best = winner
    return Refined(best.ffn, tuple(rounds), inputs, best.down, best.note)


def better_of(best: Iterate, trial: Iterate) -> tuple[Iterate, float]:
    """The one with the lower error, and the error of the second: of a wide FFN a loser is not to be kept."""
    return (trial if trial.error < best.error else best), trial.error


def next_step(start: float, errors: Sequence[float]) -> float:
    """The over-relaxation to try after those that led from error ``start`` to these."""
    if not errors:
        return STEPS[0]
    return STEPS[1] if errors[-1] < start else STEPS[2]


def moved(
    ffn: FeedForward,
    direction: Float[Tensor, "R D"],
    step: float,
    H: Float[Tensor, "D D"],
    patterns: Patterns,
    options: SparseLLM,
) -> FeedForward:
    """The first matrices as close to W + step * direction as their pattern allows: largest entries in normalised units,
    refitted.

    A pruned weight comes back where the change makes it larger than a kept one.
    """
    target = torch.add(first_weights(ffn), direction, alpha=step)
    mask = keep_mask((target * channel_norms(H)).abs_(), patterns.first)
    return with_first(ffn, masked_fit(target, H, mask, options.fit_damp))


def pull(
    ffn: FeedForward, H: Float[Tensor, "D D"], tokens: Tokens, options: SparseLLM, combine: Combine = alone
) -> tuple[Float[Tensor, "R D"], float]:
    """Where the targets pull the first matrices: the least-squares change that follows z and s one step from realised.

    Anchored on the realised pre-activations, so that nothing has to be carried from round to round. Also the
    objective F per token after that step.
    """
    R, D = first_weights(ffn).shape
    unit = COUPLING * float(ffn.down.W.square().sum(dim=1).mean())
    penalties = Penalties(options.alpha * unit, options.beta, options.gamma * unit)
    step = ActivationStep(ffn.down.W, penalties)
    change = CrossMoments.zeros(R, D, H.device, H.dtype)
    objective = Totals.zeros(1, H.device)
    for X, Y in tokens:
        realised = pre_activations(ffn, X)
        wanted = step.change(activated(ffn, realised), ffn.down.without_bias(Y))
        moves, cost = anchored_step(ffn, realised, wanted.activation, penalties, SLICE)
        change.update(moves, X)
        objective.sum += cost + penalties.beta * float(wanted.left.square().sum())
    combine(change)
    combine(objective)
    return fit_change(change.mean(), H, options.fit_damp), float(objective.sum) / change.tokens


def solve_down(
    ffn: FeedForward,
    W0: Float[Tensor, "D K"],
    tokens: Tokens,
    patterns: Patterns,
    options: SparseLLM,
    solver: LayerSolver,
    combine: Combine = alone,
) -> tuple[FeedForward, Fitted, str]:
    """The down projection fitted to the targets on the activations that ``ffn`` really produces, then pruned."""
    target, inputs = fitted_down(ffn, W0, tokens, options.fit_damp, combine)
    pruned = solver.solve(target, inputs.H, patterns.down)
    return with_down(ffn, pruned.W), fitted(W0, pruned.W, inputs), pruned.note


def fitted(W0: Float[Tensor, "D K"], W: Float[Tensor, "D K"], inputs: Observed) -> Fitted:
    return Fitted(relative_error(W0, W, inputs.H), inputs_of(inputs))


def fitted_down(
    ffn: FeedForward, W0: Float[Tensor, "D K"], tokens: Tokens, damp: float, combine: Combine
) -> tuple[Float[Tensor, "D K"], Observed]:
    """The same before it is pruned, and the activations."""
    D, K = W0.shape
    gram, residual = Gram.zeros(K, W0.device, W0.dtype), CrossMoments.zeros(D, K, W0.device, W0.dtype)
    reference = Affine(W0, ffn.down.b)
    for X, Y in tokens:
        a = ffn.hidden(X)
        gram.update(a)
        residual.update(Y - reference(a), a)
    combine(gram)
    combine(residual)
    inputs = gram.observed()
    del gram  # as large as H
    return fit(W0, inputs.H, residual.mean(), damp), inputs
