"""SparseLLM (arXiv:2402.17946): prune the matrices of a feed-forward network jointly, not one by one.

Two modes. ``paper`` is the published procedure in streaming form: iteration 0 is the inner solver on every linear, then
T - 1 rounds refit and re-prune the FFN's matrices on auxiliary variables; the last iterate is kept. ``closed`` closes
the loop that the paper leaves open: the down projection is fitted to the activation that the pruned network really
produces, rounds start from realised activations, and the best iterate by true error on held-out tokens is kept, with
iteration 0 always a candidate.

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
    Auxiliary,
    FeedForward,
    Penalties,
    activated,
    anchored_step,
    chunk_objective,
    gradient_step,
    newton_step,
    pre_activations,
    stacked,
    update_auxiliary,
)
from secateur.core.linalg import channel_norms, fit
from secateur.core.moments import Combine, CrossMoments, Gram, Totals, alone
from secateur.core.pattern import Pattern, Stacked, keep_mask
from secateur.core.refit import masked_fit
from secateur.core.solver import LayerSolver, Needs
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
    """Closed mode's ridge of the least-squares fits towards the original weights, as a fraction of mean(diag H)."""
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


class Refined(NamedTuple):
    """A pruned FFN, every iterate on the way, and the notes of the solver."""

    ffn: FeedForward
    rounds: tuple[Round, ...]
    first_gram: Gram
    """Of the inputs that the first matrices were pruned for."""
    down_gram: Gram
    """The same of the down projection."""
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


def input_gram(ffn: FeedForward, tokens: Tokens, combine: Combine = alone) -> Gram:
    W = ffn.up.W
    gram = Gram.zeros(W.shape[1], W.device, W.dtype)
    for X, _ in tokens:
        gram.update(X)
    combine(gram)
    return gram


# --------------------------------------------------------------------------------------------------------- closed mode


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
    down_gram: Gram
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
        ffn, down_gram, down_note = solve_down(ffn, dense.down.W, train, patterns, options, solver, combine)
        return Iterate(ffn, down_gram, output_error(ffn, held, combine), note or down_note)

    inputs = input_gram(dense, train, combine)
    H = inputs.mean()
    first = solver.solve(first_weights(dense), H, patterns.first)
    best = closed(with_first(dense, first.W), first.note)
    rounds = [Round(0, None, best.error, True)]
    for t in range(1, options.iterations):
        direction, objective = pull(best.ffn, H, train, options, combine)
        trials = [closed(moved(best.ffn, STEPS[0] * direction, H, patterns, options), best.note)]
        step = STEPS[1] if trials[0].error < best.error else STEPS[2]
        trials.append(closed(moved(best.ffn, step * direction, H, patterns, options), best.note))
        trial = min(trials, key=lambda iterate: iterate.error)
        better = trial.error < best.error
        rounds.append(Round(t, objective, trial.error, better))
        if not better:
            break
        rounds[t - 1] = rounds[t - 1]._replace(chosen=False)
        best = trial
    return Refined(best.ffn, tuple(rounds), inputs, best.down_gram, best.note)


def moved(
    ffn: FeedForward, change: Float[Tensor, "R D"], H: Float[Tensor, "D D"], patterns: Patterns, options: SparseLLM
) -> FeedForward:
    """The first matrices as close to W + change as their pattern allows: largest entries in normalised units, refitted.

    A pruned weight comes back where the change makes it larger than a kept one.
    """
    target = first_weights(ffn) + change
    mask = keep_mask((target * channel_norms(H)).abs(), patterns.first)
    return with_first(ffn, masked_fit(target, H, mask, options.fit_damp))


def pull(
    ffn: FeedForward, H: Float[Tensor, "D D"], tokens: Tokens, options: SparseLLM, combine: Combine = alone
) -> tuple[Float[Tensor, "R D"], float]:
    """Where the targets pull the first matrices: the least-squares change that follows z and s one step from realised.

    Anchored on the realised pre-activations, so that nothing has to be carried from round to round. Also the
    objective F per token after that step.
    """
    W = first_weights(ffn)
    unit = COUPLING * float(ffn.down.W.square().sum(dim=1).mean())
    penalties = Penalties(options.alpha * unit, options.beta, options.gamma * unit)
    step = ActivationStep(ffn.down.W, penalties)
    change = CrossMoments.zeros(W.shape[0], W.shape[1], W.device, W.dtype)
    objective = Totals.zeros(1, W.device)
    for X, Y in tokens:
        realised = pre_activations(ffn, X)
        wanted = step.change(activated(ffn, realised), ffn.down.without_bias(Y))
        moves, cost = anchored_step(ffn, realised, wanted.activation, penalties, SLICE)
        change.update(moves, X)
        objective.sum += cost + penalties.beta * float(wanted.left.square().sum())
    combine(change)
    combine(objective)
    return fit(torch.zeros_like(W), H, change.mean(), options.fit_damp), float(objective.sum) / change.tokens


def solve_down(
    ffn: FeedForward,
    W0: Float[Tensor, "D K"],
    tokens: Tokens,
    patterns: Patterns,
    options: SparseLLM,
    solver: LayerSolver,
    combine: Combine = alone,
) -> tuple[FeedForward, Gram, str]:
    """The down projection fitted to the targets on the activations that ``ffn`` really produces, then pruned."""
    D, K = W0.shape
    gram, residual = Gram.zeros(K, W0.device, W0.dtype), CrossMoments.zeros(D, K, W0.device, W0.dtype)
    reference = Affine(W0, ffn.down.b)
    for X, Y in tokens:
        a = ffn.hidden(X)
        gram.update(a)
        residual.update(Y - reference(a), a)
    combine(gram)
    combine(residual)
    H = gram.mean()
    pruned = solver.solve(fit(W0, H, residual.mean(), options.fit_damp), H, patterns.down)
    return with_down(ffn, pruned.W), gram, pruned.note


# ---------------------------------------------------------------------------------------------------------- paper mode


GATE_STEPS = {"gauss-newton": newton_step, "gradient": gradient_step}
PAPER_DAMP = 0.01
"""Ridge in place of the published pseudo-inverse, which inverts rounding noise; the published damping of H."""


class FitSums(NamedTuple):
    """What the next least-squares fits need of all tokens."""

    first: Float[Tensor, "R D"]
    """Residual cross moments of the first matrices, gate over up: (target - X W0ᵀ)ᵀ X / tokens."""
    down: Float[Tensor, "D K"]
    down_gram: Gram
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
    """The published rounds, from iteration 0's ``pruned`` FFN (the solver on every matrix alone) to the last iterate.

    z and s start from the dense network and are carried from round to round, as is H of the first matrices.
    ``combine`` as in closed mode.
    """
    inputs = input_gram(dense, tokens, combine)
    H = inputs.mean()
    carried = [pre_activations(dense, X) for X, _ in tokens]
    ffn, note, down_gram = pruned, "", Gram.zeros(dense.down.W.shape[1])
    rounds = [Round(0, None, output_error(pruned, tokens, combine), options.iterations == 1)]
    for t in range(1, options.iterations):
        carried, sums = update_tokens(dense, ffn, tokens, carried, options, combine)
        down_gram = sums.down_gram
        G = down_gram.mean()
        first = solver.solve(fit(first_weights(dense), H, sums.first, PAPER_DAMP), H, patterns.first)
        down = solver.solve(fit(dense.down.W, G, sums.down, PAPER_DAMP), G, patterns.down)
        ffn, note = with_down(with_first(ffn, first.W), down.W), first.note or down.note
        last = t == options.iterations - 1
        rounds.append(Round(t, sums.objective, output_error(ffn, tokens, combine), last))
    return Refined(ffn, tuple(rounds), inputs, down_gram, note)


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
    return updated, FitSums(first.mean(), down.mean(), gram, float(objective.sum) / gram.tokens)
