"""What SparseLLM's two modes cost: a block's stages, and the table that leads from a method to its stages.

The terms follow ``core/sparsellm.py``, ``pruning/closed.py`` and ``pruning/paper.py`` line by line. Rounds are counted
in full; closed mode ends earlier where a round does not help.

D = hidden size, K = inner size of the FFN, R = rows of the first matrices, C = in_features.
"""

from secateur.core.refit import ITERATIONS as FIT_ITERATIONS
from secateur.core.solvers import Solver
from secateur.core.sparsellm import SparseLLM
from secateur.planning.cost import (
    FLOAT32,
    Cost,
    attention_part,
    cross,
    elementwise,
    expert_forward,
    expert_moments,
    experts_part,
    fit,
    forward,
    gram,
    layerwise_stages,
    low_rank,
    measured_error,
    product,
    propagate,
    sample,
    solve,
)
from secateur.planning.shapes import BlockShape, Routed, Run, Shared
from secateur.pruning.experts import FIT_TOKENS_PER_INPUT
from secateur.pruning.work import PROBE_TOKENS


def masked_fit(R: int, C: int) -> Cost:
    """A mask and the conjugate gradients under it."""
    products = 2 * R * C**2 * (FIT_ITERATIONS + 1)
    return Cost(product=products, selected=R * C, streamed=FLOAT32 * R * C * (22 * FIT_ITERATIONS + 10))


# ---------------------------------------------------------------------------------------------------------- closed mode


def closed_attention(shape: BlockShape, run: Run) -> tuple[Cost, Cost]:
    """(Dense forward with the Grams of what feeds the attention, the two attention passes with the fit of ``out``)."""
    dense = forward(shape, run.tokens, run)
    for group in shape.attention:
        dense += gram(group.columns, run.tokens) if group.planned else Cost()
    again, out = Cost(), shape.out
    if shape.first or not shape.experts:  # the inputs of the FFN that sees every token, experts beside it run along
        again += attention_part(shape, run.tokens, run) + elementwise(shape.hidden, 4, run.tokens)
        again += experts_part(shape, run.tokens, run)
    if out is not None and out.planned:
        again += attention_part(shape, run.tokens, run, out=False) + gram(out.columns, run.tokens)
        again += (
            cross(out.rows, out.columns, run.tokens)
            + product(out.rows, out.columns, run.tokens)
            + fit(out.rows, out.columns)
        )
    return dense, again


def ffn_inner(first: Shared, down: Shared, tokens: float) -> Cost:
    """The input of the down projection, in float32."""
    return product(first.rows, first.columns, tokens) + elementwise(down.columns, 5, tokens)


def ffn_output(first: Shared, down: Shared, tokens: float) -> Cost:
    return ffn_inner(first, down, tokens) + product(down.rows, down.columns, tokens) + elementwise(down.rows, 5, tokens)


def solve_down(first: Shared, down: Shared, run: Run) -> Cost:
    """Realised activations of the fitted tokens, their moments, a fit, and the error on the held-out tokens."""
    D, K = down.rows, down.columns
    moments = ffn_inner(first, down, run.fitted) + gram(K, run.fitted) + cross(D, K, run.fitted)
    return (
        moments
        + product(D, K, run.fitted)
        + elementwise(D, 4, run.fitted)
        + fit(D, K)
        + ffn_output(first, down, run.held)
    )


def pull(first: Shared, down: Shared, run: Run) -> Cost:
    """The activation step, its move of the first matrices' outputs, and the fit that follows them."""
    D, K, R = down.rows, down.columns, first.rows
    step = Cost(product=2 * D**2 * K, factor=D**3 + 2 * D**2 * K)
    tokens = product(R, D, run.fitted) + product(D, K, run.fitted).times(2) + product(D, D, run.fitted)
    moved = elementwise(K, 5 + 22, run.fitted) + elementwise(R, 3, run.fitted) + elementwise(D, 6, run.fitted)
    return step + tokens + moved + cross(R, D, run.fitted) + fit(R, D)


def closed_ffn(first: Shared, down: Shared, options: SparseLLM, run: Run) -> tuple[Cost, Cost]:
    """(FFN without its solves, the layer solves in it); every round tries two lengths."""
    rounds = options.iterations - 1
    once = gram(first.columns, run.fitted) + solve_down(first, down, run)
    trial = masked_fit(first.rows, first.columns) + solve_down(first, down, run)
    work = once + (pull(first, down, run) + trial.times(2)).times(rounds)
    measured = measured_error(options.inner, down.rows, down.columns).times(2 * rounds)  # of each candidate
    return work, solve(options.inner, first) + solve(options.inner, down, 1 + 2 * rounds) + measured


def fits(routed: Routed, run: Run) -> bool:
    """Whether an expert has tokens enough for SparseLLM's own fits."""
    return run.tokens * routed.share >= FIT_TOKENS_PER_INPUT * routed.widest


def own_run(routed: Routed, run: Run) -> Run:
    """The tokens of one expert as a calibration of its own."""
    return run._replace(samples=1, seq_len=int(run.tokens * routed.share), batch=1)


def closed_expert(routed: Routed, options: SparseLLM, run: Run) -> tuple[Cost, Cost]:
    """(Targets, fits and rounds of one expert, its solves); moments and solves alone where its tokens are too few."""
    own = own_run(routed, run)
    if not fits(routed, run):
        again = expert_forward(routed, own.tokens) + expert_moments(routed, options.inner, run)
        return again, sum((solve(options.inner, group) for group in routed.groups), Cost())
    ffn, solved = closed_ffn(routed.first, routed.down, options, own)
    return ffn + ffn_output(routed.first, routed.down, own.tokens), solved


def closed_stages(shape: BlockShape, options: SparseLLM, run: Run) -> dict[str, Cost]:
    dense, attention = closed_attention(shape, run)
    ffn, ffn_solves = Cost(), Cost()
    if shape.first and shape.down:
        ffn, ffn_solves = closed_ffn(shape.first, shape.down, options, run)
        ffn += ffn_output(shape.first, shape.down, run.tokens) if options.target == "ffn" else Cost()
    planned = [routed for routed in shape.experts if routed.planned]
    attention += forward(shape, run.tokens, run) if planned else Cost()  # who is routed where, as things stand
    for routed in planned:
        work, solved = closed_expert(routed, options, run)
        ffn, ffn_solves = ffn + work.times(routed.count), ffn_solves + solved.times(routed.count)
    around = (*shape.attention, *((shape.out,) if shape.out else ()))
    return {
        "sample": sample(shape, run),
        "dense forward": dense,
        "attention forward": attention,
        "ffn": ffn,
        "solve": ffn_solves + sum((solve(options.inner, group) for group in around), Cost()),
        "propagate": propagate(shape, run),
    }


# ----------------------------------------------------------------------------------------------------------- paper mode


def paper_round(first: Shared, down: Shared, run: Run) -> Cost:
    """p, z and s of every token, the moments of the fits, and the error of what comes out."""
    T, D, K, R = run.tokens, down.rows, down.columns, first.rows
    step = Cost(product=2 * D**2 * K, factor=D**3 + 2 * D**2 * K)
    products = product(R, D, T).times(2) + product(D, K, T).times(4) + cross(R, D, T) + cross(D, K, T) + gram(K, T)
    updates = elementwise(K, 70, T) + elementwise(D, 8, T)
    return step + products + updates + fit(R, D) + fit(D, K) + ffn_output(first, down, T)


def paper_ffn(first: Shared, down: Shared, options: SparseLLM, run: Run) -> tuple[Cost, Cost]:
    """(The rounds of one FFN, the solves in them)."""
    rounds = options.iterations - 1
    start = ffn_output(first, down, run.tokens).times(2) + gram(first.columns, run.tokens)
    start += product(first.rows, first.columns, run.tokens)
    again = solve(options.inner, first, rounds) + solve(options.inner, down, rounds)
    return start + paper_round(first, down, run).times(rounds), again


def paper_stages(shape: BlockShape, options: SparseLLM, run: Run) -> dict[str, Cost]:
    """Iteration 0 is layer by layer; then the rounds of the FFN and of every expert with tokens enough."""
    stages = layerwise_stages(shape, options.inner, run)
    ffns = [(shape.first, shape.down, 1, run)] if shape.first and shape.down else []
    ffns += [(r.first, r.down, r.count, own_run(r, run)) for r in shape.experts if r.planned and fits(r, run)]
    if not ffns or options.iterations == 1:
        return stages
    stages["ffn"] = Cost()
    for first, down, count, own in ffns:
        rounds, solved = paper_ffn(first, down, options, own)
        stages["ffn"] += rounds.times(count)
        stages["solve"] += solved.times(count)
    return stages


MODES = {"closed": closed_stages, "paper": paper_stages}


def block_stages(shape: BlockShape, method: Solver | SparseLLM, run: Run, rank: int = 0) -> dict[str, Cost]:
    """What pruning one block costs, by stage, with branches of that rank. What needs no text sees one short row."""
    if isinstance(method, SparseLLM):
        stages = MODES[method.mode](shape, method, run)
    else:
        if method.needs == "nothing" and not rank:
            run = run._replace(samples=1, seq_len=min(run.seq_len, PROBE_TOKENS), batch=1)
        stages = layerwise_stages(shape, method, run)
    return stages | ({"low rank": low_rank(shape, run)} if rank else {})
