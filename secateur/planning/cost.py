"""What a run costs, from shapes alone: operations, bytes and selections of every stage, one pure function each.

A ``Cost`` counts by kind of work, because a machine has a rate for each: products of a forward, sums and products at
the run's precision (Gram matrices, the FFN's rounds), products of the solves in full float32, attention,
factorisations, columns swept, scores that a mask is chosen from, bytes of elementwise work. ``rates.py`` measures the
rates; seconds are the sum of count / rate.

One multiply-add is two operations, causal attention is counted as the half that is not masked, and a tensor that is
read or written once is one pass of its bytes. Elementwise passes are counted by hand in the code they stand for, for
blocks with two norms and rotary embeddings: where a block has less, that part is an upper bound, a few percent of a
run. Structure (what is attention, what FFN) is given by the caller; stages bear the names of the records' stages.

Experts are counted as if the router spread the tokens evenly: how it really does is known only in the run.

T = calibration tokens, S = tokens of a window, D = hidden size, K = inner size of the FFN, R = out_features,
C = in_features.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from secateur.core.activations import ACTIVATIONS
from secateur.core.solvers import ADMM, Magnitude, Solver, SparseGPT, Wanda
from secateur.planning.shapes import BlockShape, Routed, Run, Shared
from secateur.pruning.oneshot import ERROR_ROWS
from secateur.pruning.shortage import TOKENS_PER_INPUT
from secateur.pruning.work import PROBE_TOKENS

FLOAT32 = 4
REPLAYS = 3
"""Passes over PROBE_TOKENS in which a block's structure is observed."""


@dataclass(frozen=True)
class Cost:
    """Amounts of work by kind."""

    linear: float = 0.0
    """Operations of forwards: linears in the model's type, or in 16 bit where precision is bfloat16."""
    moment: float = 0.0
    """Operations of sums over tokens, XᵀX and ZᵀX: float32 at the run's precision."""
    product: float = 0.0
    """Operations of other float32 products at the run's precision: tokens by a matrix in the FFN's rounds."""
    exact: float = 0.0
    """Operations of products in full float32."""
    attention: float = 0.0
    """Operations of causal attention."""
    factor: float = 0.0
    """Operations of Cholesky factors and of triangular systems."""
    swept: float = 0.0
    """Weights that a column sweep visits, mask included, without its matrix products."""
    selected: float = 0.0
    """Scores that masks are chosen from."""
    streamed: float = 0.0
    """Bytes that elementwise work reads and writes."""

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, n: float) -> "Cost":
        return Cost(*(getattr(self, f.name) * n for f in fields(self)))

    @property
    def operations(self) -> float:
        """Floating-point operations of all kinds of products."""
        return self.linear + self.moment + self.product + self.exact + self.attention + self.factor


# ------------------------------------------------------------------------------------------------------------- forwards


def linears_forward(groups: tuple[Shared, ...], tokens: float) -> Cost:
    return Cost(linear=2 * tokens * sum(group.size for group in groups))


def attention_forward(shape: BlockShape, tokens: float, seq_len: int) -> Cost:
    """Causal: 2 T S x width, the width of what enters the output projection."""
    return Cost(attention=2 * tokens * seq_len * (shape.out.columns if shape.out else 0))


def gram(columns: int, tokens: float) -> Cost:
    """Xᵀ X."""
    return Cost(moment=2 * tokens * columns**2)


def cross(rows: int, columns: int, tokens: float) -> Cost:
    """Zᵀ X."""
    return Cost(moment=2 * tokens * rows * columns)


def product(rows: int, columns: int, tokens: float) -> Cost:
    """X Wᵀ in float32."""
    return Cost(product=2 * tokens * rows * columns)


def elementwise(width: float, passes: float, tokens: float) -> Cost:
    return Cost(streamed=FLOAT32 * tokens * width * passes)


def casts(groups: tuple[Shared, ...], tokens: float, run: Run) -> Cost:
    """Under autocast inputs of linears, and in every chunk the weights, are rounded: 4 bytes read, 2 written."""
    if not run.rounded:
        return Cost()
    weights = sum(group.size for group in groups) * tokens / run.chunk
    return Cost(streamed=6 * (weights + tokens * sum(group.columns for group in groups)))


def attention_part(shape: BlockShape, tokens: float, run: Run, out: bool = True) -> Cost:
    """Norm, q, k, v, rotary embedding, attention, and unless the pass ends before it, output projection, residual."""
    groups = (*shape.attention, *((shape.out,) if shape.out and out else ()))
    rotated = sum(group.rows for group in shape.attention)
    more = elementwise(shape.hidden, 10, tokens) + elementwise(rotated, 10, tokens) + casts(groups, tokens, run)
    return linears_forward(groups, tokens) + attention_forward(shape, tokens, run.seq_len) + more


def ffn_part(shape: BlockShape, tokens: float, run: Run) -> Cost:
    """Norm, first matrices, activation, down projection, residual."""
    groups = tuple(group for group in (shape.first, shape.down) if group)
    inner = shape.down.columns if shape.down else 0
    more = elementwise(shape.hidden, 12, tokens) + elementwise(inner, 5, tokens) + casts(groups, tokens, run)
    return linears_forward(groups, tokens) + more


def expert_forward(routed: Routed, tokens: float) -> Cost:
    """One expert on so many tokens of its own: matrices, activation, and each token gathered, weighted, given back."""
    return (
        linears_forward(routed.groups, tokens)
        + elementwise(routed.down.columns, 5, tokens)
        + elementwise(routed.down.rows, 6, tokens)
    )


def experts_part(shape: BlockShape, tokens: float, run: Run) -> Cost:
    total = Cost()
    for routed in shape.experts:
        weights = sum(group.size for group in routed.groups) * tokens / run.chunk if run.rounded else 0.0
        total += (expert_forward(routed, tokens * routed.share) + Cost(streamed=6 * weights)).times(routed.count)
    return total


def forward(shape: BlockShape, tokens: float, run: Run) -> Cost:
    return attention_part(shape, tokens, run) + ffn_part(shape, tokens, run) + experts_part(shape, tokens, run)


# --------------------------------------------------------------------------------------------------------------- solves


def magnitude(solver: Magnitude, R: int, C: int) -> Cost:
    return Cost(selected=R * C, streamed=4 * FLOAT32 * R * C)


def wanda(solver: Wanda, R: int, C: int) -> Cost:
    return Cost(selected=R * C, streamed=6 * FLOAT32 * R * C)


def sparsegpt(solver: SparseGPT, R: int, C: int) -> Cost:
    """Cholesky C³/3, inverse of the factor C³ (BLAS does not use that the right-hand side is I), sweep R C²."""
    return Cost(factor=C**3 / 3 + C**3, exact=R * C**2, swept=R * C)


def admm(solver: ADMM, R: int, C: int) -> Cost:
    """Cholesky and inverse C³, then every iteration a product of 2 R C² and 16 passes; a mask in each of the ramp."""
    products = 2 * R * C**2 * (1 + solver.iterations)
    passes = 16 * solver.iterations + 3 * solver.ramp
    return Cost(factor=C**3, exact=products, selected=R * C * solver.ramp, streamed=FLOAT32 * R * C * passes)


SOLVES: dict[type[Solver], Callable[[Any, int, int], Cost]] = {
    Magnitude: magnitude,
    Wanda: wanda,
    SparseGPT: sparsegpt,
    ADMM: admm,
}


def measured_error(solver: Solver, R: int, C: int) -> Cost:
    """The two energies of ``relative_error``."""
    return Cost(exact=4 * R * C**2) if solver.needs == "gram" else Cost(streamed=6 * FLOAT32 * R * C)


def solve(solver: Solver, group: Shared, times: int = 1) -> Cost:
    """The planned rows of one stacked matrix: solved, so many times over, then written back and measured once."""
    R, C = group.planned, group.columns
    if not R:
        return Cost()
    once = SOLVES[type(solver)](solver, R, C)
    return once.times(times) + measured_error(solver, R, C) + elementwise(C, 6, R)


def fit(R: int, C: int) -> Cost:
    """A least-squares fit: one factor, R right-hand sides."""
    return Cost(factor=C**3 / 3 + 2 * R * C**2)


# ------------------------------------------------------------------------------------------------------- layer by layer


def moments(solver: Solver, group: Shared, tokens: float) -> Cost:
    """What a solver needs of one group's input."""
    if not group.planned or solver.needs == "nothing":
        return Cost()
    return gram(group.columns, tokens) if solver.needs == "gram" else elementwise(group.columns, 3, tokens)


def expert_moments(routed: Routed, solver: Solver, run: Run) -> Cost:
    """The same of one expert, on a sample of all tokens too where its own are fewer than a group's inputs."""
    own = run.tokens * routed.share
    short = [group for group in routed.groups if own < TOKENS_PER_INPUT * group.columns and group.planned]
    total = sum((moments(solver, group, own) for group in routed.groups), Cost())
    if short and solver.needs != "nothing":
        pool = run.tokens // max(1, run.tokens // (TOKENS_PER_INPUT * routed.widest))
        total += sum((moments(solver, group, pool) for group in short), expert_forward(routed, pool))
    return total


def observe(shape: BlockShape, solver: Solver, run: Run) -> Cost:
    """One forward, and the moments of every planned group's input."""
    if solver.needs == "nothing":
        return Cost()
    own = sum((moments(solver, group, run.tokens) for group in shape.groups), forward(shape, run.tokens, run))
    return sum((expert_moments(one, solver, run).times(one.count) for one in shape.experts), own)


def expert_solves(routed: Routed, solver: Solver) -> Cost:
    return sum((solve(solver, group) for group in routed.groups), Cost()).times(routed.count)


def solves(shape: BlockShape, solver: Solver) -> Cost:
    own = sum((solve(solver, group) for group in shape.groups), Cost())
    return sum((expert_solves(routed, solver) for routed in shape.experts), own)


def sample(shape: BlockShape, run: Run) -> Cost:
    """The dense block's outputs on the chunks its error is measured on, and the replays that show its structure.

    Experts show theirs by one run of each, and one of the mixture with every activation that is known.
    """
    replays = REPLAYS + bool(shape.experts and shape.first)
    shown = forward(shape, min(ERROR_ROWS, run.samples) * run.seq_len + replays * PROBE_TOKENS, run)
    for routed in shape.experts:
        tokens = PROBE_TOKENS * (1 + len(ACTIVATIONS) * routed.share)
        shown += expert_forward(routed, tokens).times(routed.count)
    return shown


def propagate(shape: BlockShape, run: Run) -> Cost:
    return forward(shape, run.tokens, run)


def low_rank(shape: BlockShape, run: Run) -> Cost:
    """Both blocks on all tokens for each input, moments of it and of what outputs lack, factors and what they explain.

    Not counted: the singular values, and the branches' own forwards, small beside the linears'.
    """
    total = Cost()
    for group in shape.groups:
        R, C = group.planned, group.columns
        if R:
            total += forward(shape, run.tokens, run).times(2) + gram(C, run.tokens) + cross(R, C, run.tokens)
            total += product(R, C, run.tokens).times(0 if group is shape.down else 2)  # that lacks what the block does
            total += Cost(factor=C**3 / 3 + 2 * R * C**2, exact=2 * R * C**2)
    return total


def layerwise_stages(shape: BlockShape, solver: Solver, run: Run) -> dict[str, Cost]:
    return {
        "sample": sample(shape, run),
        "observe": observe(shape, solver, run),
        "solve": solves(shape, solver),
        "propagate": propagate(shape, run),
    }
