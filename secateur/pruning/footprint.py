"""What a run holds in memory at its fullest moment, from shapes alone: named bytes of host and device.

The hidden states are counted as the code holds them. Layer by layer: the block's inputs, twice the copy without
non-finite rows, and the outputs. Closed mode: inputs, their copy, dense outputs, attention inputs, FFN inputs, residual
stream and targets; paper mode keeps FFN inputs and targets and, two generations at a time, z and s of every token.

T = calibration tokens, D = hidden size, K = inner size of the FFN, R = out_features, C = in_features.
"""

from dataclasses import dataclass

from secateur.core.solvers import ADMM, Magnitude, Solver, SparseGPT, Wanda
from secateur.core.sparsellm import SparseLLM
from secateur.pruning.cost import FLOAT32, BlockShape, Run, Shared
from secateur.pruning.work import PROBE_TOKENS

COPIES = {"layerwise": 4.0, "paper": 4.0, "closed": 7.0}
"""Tensors of T x D that wait in host memory at one time."""
SOLVE_FLOATS: dict[type[Solver], tuple[int, int]] = {Magnitude: (0, 4), Wanda: (0, 5), SparseGPT: (3, 5), ADMM: (4, 8)}
"""(C x C, R x C) float32 matrices inside a solve, its argument W and the result's copies included."""


@dataclass(frozen=True)
class Footprint:
    """Bytes by purpose."""

    hidden: float
    """Hidden states of all tokens, where they wait: host memory."""
    carried: float
    """Paper mode's z and s, on the device."""
    block: float
    """The block at work, and closed mode's dense copy of it."""
    moments: float
    """Gram matrices and cross moments."""
    solve: float
    """Inside the largest solve."""
    chunk: float
    """Activations of one chunk."""

    @property
    def work(self) -> float:
        """What is where the block is."""
        return self.carried + self.block + self.moments + self.solve + self.chunk

    def to_dict(self) -> dict[str, float]:
        return {name: float(value) for name, value in vars(self).items()}


def mode_of(method: Solver | SparseLLM) -> str:
    return method.mode if isinstance(method, SparseLLM) else "layerwise"


def footprint(shape: BlockShape, method: Solver | SparseLLM, run: Run, itemsize: int) -> Footprint:
    """Of a block at work; ``itemsize`` is the bytes of a weight or of a hidden value."""
    mode, solver = mode_of(method), method.inner if isinstance(method, SparseLLM) else method
    if method.needs == "nothing":
        run = run._replace(samples=1, seq_len=min(run.seq_len, PROBE_TOKENS))
    weights = sum(group.size for group in shape.groups) * itemsize
    carries = mode == "paper" and isinstance(method, SparseLLM) and method.iterations > 1 and shape.first
    return Footprint(
        hidden=COPIES[mode] * run.tokens * shape.hidden * itemsize,
        carried=2 * FLOAT32 * run.tokens * shape.first.rows if carries and shape.first else 0.0,
        block=weights * (2 if mode == "closed" else 1),
        moments=moments(shape, solver, mode),
        solve=max((solve_bytes(solver, group) for group in shape.groups if group.planned), default=0.0),
        chunk=chunk_bytes(shape, run, mode),
    )


def moments(shape: BlockShape, solver: Solver, mode: str) -> float:
    """Sums of all planned groups at one time; of the FFN alone, with its cross moments, where that is more."""
    planned = [group.columns for group in shape.groups if group.planned]
    if mode == "layerwise":
        sizes = {"gram": sum(C * C for C in planned), "diag": sum(planned), "nothing": 0}
        return FLOAT32 * sizes[solver.needs]
    first, down = shape.first, shape.down
    if first is None or down is None:
        return FLOAT32 * sum(C * C for C in planned)
    return FLOAT32 * (first.columns**2 + 2 * down.columns**2 + 2 * down.size + 2 * first.size)


def solve_bytes(solver: Solver, group: Shared) -> float:
    squares, matrices = SOLVE_FLOATS[type(solver)]
    return FLOAT32 * (squares * group.columns**2 + matrices * group.planned * group.columns)


def chunk_bytes(shape: BlockShape, run: Run, mode: str) -> float:
    """Forward: what attention and FFN make of a chunk; the FFN's rounds: inner variables and outputs of both halves."""
    inner = shape.down.columns if shape.down else 0
    attention = sum(group.rows for group in shape.attention)
    forward = 2 * attention + 3 * inner + 6 * shape.hidden
    rounds = 6 * inner + 2 * (shape.first.rows if shape.first else 0) + 4 * shape.hidden
    return FLOAT32 * run.chunk * (forward if mode == "layerwise" else max(forward, rounds))
