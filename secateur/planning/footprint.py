"""What a run holds in memory at its fullest moment, from shapes alone: named bytes of host and device.

The hidden states are counted as the code holds them, all rows finite. Layer by layer: inputs and outputs of the block.
Closed mode: inputs, dense outputs, inputs and targets of the FFN; or before that inputs, dense outputs and what enters
the output projection, where that is wider. Paper mode: inputs, inputs and targets of the FFN, and on the device, two
generations at a time, z and s of every token; the Gram matrices and the dense FFNs of all experts at one time, which
closed mode has of one.

T = calibration tokens, D = hidden size, K = inner size of the FFN, R = out_features, C = in_features.
"""

from dataclasses import dataclass

from secateur.core.solvers import ADMM, Magnitude, Solver, SparseGPT, Wanda
from secateur.core.sparsellm import SparseLLM
from secateur.planning.cost import FLOAT32
from secateur.planning.shapes import BlockShape, Run, Shared
from secateur.pruning.work import PROBE_TOKENS

COPIES = {"layerwise": 2, "paper": 3, "closed": 4}
"""Tensors of T x D that wait in host memory at one time."""
FFN_COPIES = {"closed": 4, "paper": 3}
"""Of an FFN's matrices in float32 while SparseLLM works on it: dense, best so far, candidate; closed mode has two."""
SOLVE_FLOATS: dict[type[Solver], tuple[tuple[int, int], ...]] = {
    Magnitude: ((0, 4),),
    Wanda: ((0, 5),),
    SparseGPT: ((3, 5),),
    ADMM: ((3, 4), (1, 7)),
}
"""(C x C, R x C) float32 matrices inside a solve at each of its stages, its argument W and the result included."""


@dataclass(frozen=True)
class Footprint:
    """Bytes by purpose."""

    hidden: float
    """Hidden states of all tokens, where they wait: host memory."""
    state: float
    """Those that a block begins with, a part of ``hidden``."""
    carried: float
    """Paper mode's z and s, on the device."""
    block: float
    """The block at work."""
    dense: float
    """The same before it was pruned, which low-rank branches are fitted to."""
    copies: float
    """Of its FFN, SparseLLM's."""
    moments: float
    """Gram matrices and cross moments."""
    solve: float
    """Inside the largest solve."""
    chunk: float
    """Activations of one chunk."""

    @property
    def work(self) -> float:
        """What is where the block is."""
        return self.carried + self.block + self.dense + self.copies + self.moments + self.solve + self.chunk

    def to_dict(self) -> dict[str, float]:
        return {name: float(value) for name, value in vars(self).items()}


def mode_of(method: Solver | SparseLLM) -> str:
    return method.mode if isinstance(method, SparseLLM) else "layerwise"


def footprint(shape: BlockShape, method: Solver | SparseLLM, run: Run, itemsize: int, low_rank: int = 0) -> Footprint:
    """Of a block at work; ``itemsize`` is the bytes of a weight or of a hidden value."""
    mode, solver = mode_of(method), method.inner if isinstance(method, SparseLLM) else method
    if method.needs == "nothing" and not low_rank:
        run = run._replace(samples=1, seq_len=min(run.seq_len, PROBE_TOKENS))
    rounds = isinstance(method, SparseLLM) and (mode == "closed" or method.iterations > 1)
    carries = mode == "paper" and rounds and shape.first
    return Footprint(
        hidden=waiting(shape, mode, rounds) * run.tokens * itemsize,
        state=run.tokens * shape.hidden * itemsize,
        carried=2 * FLOAT32 * run.tokens * shape.first.rows if carries and shape.first else 0.0,
        block=shape.size * itemsize,
        dense=shape.size * itemsize if low_rank else 0.0,
        copies=copies(shape, mode) if rounds else 0.0,
        moments=moments(shape, solver, mode if rounds else "layerwise"),
        solve=max((solve_bytes(solver, group) for group in shape.matrices if group.planned), default=0.0),
        chunk=chunk_bytes(shape, run, mode),
    )


def ffns(shape: BlockShape) -> list[tuple[Shared, Shared, int]]:
    """(First, down, how many) of the FFN that sees every token, and of the experts of each kind."""
    own = [(shape.first, shape.down, 1)] if shape.first and shape.down else []
    return own + [(routed.first, routed.down, routed.count) for routed in shape.experts]


def copies(shape: BlockShape, mode: str) -> float:
    """Of the largest FFN; paper mode reads the dense matrices of all before it prunes any."""
    sizes = [(first.size + down.size, count) for first, down, count in ffns(shape)]
    largest = max((size for size, _ in sizes), default=0)
    others = sum(size * count for size, count in sizes) - largest if mode == "paper" else 0
    return FLOAT32 * (FFN_COPIES[mode] * largest + others)


def waiting(shape: BlockShape, mode: str, rounds: bool) -> float:
    """Hidden values of a token that wait at the fullest moment; experts' inputs wait once for each that it goes to."""
    width = COPIES[mode if rounds else "layerwise"] * shape.hidden
    entering = shape.out.columns if mode == "closed" and shape.out and shape.out.planned else 0
    routed = sum(one.count * one.share for one in shape.experts) if rounds else 0
    return max(width, 2 * shape.hidden + entering, (2 + routed) * shape.hidden)


def moments(shape: BlockShape, solver: Solver, mode: str) -> float:
    """Sums of all planned groups at one time; of one FFN, with its cross moments. Paper mode has first these, then
    those."""
    planned = [group.columns for group in shape.groups if group.planned]
    planned += [g.columns for routed in shape.experts for g in routed.groups if g.planned for _ in range(routed.count)]
    every = {"gram": sum(C * C for C in planned), "diag": sum(planned), "nothing": 0}[solver.needs]
    sizes = [first.columns**2 + down.columns**2 + down.size + first.size for first, down, _ in ffns(shape)]
    ffn = max(sizes, default=0)
    return FLOAT32 * {"layerwise": every, "closed": ffn or every, "paper": max(every, ffn)}[mode]


def solve_bytes(solver: Solver, group: Shared) -> float:
    R, C = group.planned, group.columns
    return FLOAT32 * max(squares * C**2 + matrices * R * C for squares, matrices in SOLVE_FLOATS[type(solver)])


def chunk_bytes(shape: BlockShape, run: Run, mode: str) -> float:
    """Forward: what attention and FFN make of a chunk; the FFN's rounds: inner variables and outputs of both halves."""
    inner = shape.down.columns if shape.down else 0
    attention = sum(group.rows for group in shape.attention)
    forward = 2 * attention + 3 * inner + 6 * shape.hidden
    rounds = 6 * inner + 2 * (shape.first.rows if shape.first else 0) + 4 * shape.hidden
    return FLOAT32 * run.chunk * (forward if mode == "layerwise" else max(forward, rounds))
