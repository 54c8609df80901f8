"""How fast this machine does each kind of work that ``cost.py`` counts, measured in a few seconds.

Every probe is a piece of the real work at the model's own widths, repeated for a moment. On a processor its seconds are
CPU time, of the calling thread or of the average one if that is more: what a clock on the wall would say if the machine
did nothing else. How much longer the clock really took is kept as ``slowdown``. Threads are those that torch is set to,
as in the run to come.
"""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.core.linalg import inverse_cholesky
from secateur.core.moments import Gram
from secateur.core.pattern import NM, Block, Pattern, Unstructured, keep_mask
from secateur.core.solvers import SparseGPT
from secateur.planning.cost import FLOAT32, Cost, gram, linears_forward, product, sparsegpt
from secateur.planning.shapes import BlockShape, Run, Shared
from secateur.pruning.work import products

BUDGET = 1e10
"""Operations of one probe: 0.1 s at 100 GFLOP/s."""
LEAST_ROWS, MOST_COLUMNS, MOST_ROWS = 256, 1024, 1024
WIDEST, LARGEST = 8192, 1 << 25
"""Columns, and weights, of a probe at most: 128 MB in float32."""
REPEATS, PATIENCE = 3, 0.25
"""Least repetitions of a probe, and seconds in which more are tried."""
DISK_BYTES = 64 << 20
TILES: dict[type[Pattern], Callable[[Any], tuple[int, int]]] = {
    Unstructured: lambda pattern: (1, 1),
    NM: lambda pattern: (1, pattern.m),
    Block: lambda pattern: (pattern.rows, pattern.cols),
}
"""What a pattern does not cut apart."""
HEAD = 64
"""Width of a head where the model does not tell."""


@dataclass(frozen=True)
class Rates:
    """Amounts a second, by the kinds of ``Cost``, and bytes a second of the disk."""

    linear: float
    moment: float
    product: float
    exact: float
    attention: float
    factor: float
    swept: float
    selected: float
    streamed: float
    disk: float
    slowdown: float
    """How many times longer than on an idle machine the probes took just now; the rates are those of an idle one."""

    def seconds(self, cost: Cost) -> float:
        return sum(getattr(cost, f.name) / getattr(self, f.name) for f in fields(cost))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Probe:
    """What is to be measured: the widest block, the run, its pattern and types."""

    shape: BlockShape
    run: Run
    pattern: Pattern
    device: str
    precision: Literal["float32", "bfloat16"]
    dtype: torch.dtype
    """Of the model's weights."""
    head: int = HEAD
    """Width of an attention head."""

    @property
    def widest(self) -> Shared:
        """The largest matrix, or as much of it as a probe may hold."""
        group = max(self.shape.matrices, key=lambda group: group.size)
        columns = min(group.columns, WIDEST)
        return Shared(min(group.rows, LARGEST // columns), columns, 0)

    @property
    def deepest(self) -> int:
        """The widest input."""
        return min(max(group.columns for group in self.shape.matrices), WIDEST)

    @property
    def forward_dtype(self) -> torch.dtype:
        rounded = self.precision == "bfloat16" and self.dtype == torch.float32
        return torch.bfloat16 if rounded else self.dtype

    def rows(self, operations_per_row: float) -> int:
        """Tokens that keep a probe short."""
        return int(min(max(BUDGET / operations_per_row, LEAST_ROWS), max(self.run.chunk, 2)))

    def piece(self, columns: int) -> tuple[int, int]:
        """Rows and columns of a piece of the widest matrix that carries the pattern: whole groups, whole tiles."""
        high, wide = TILES[type(self.pattern)](self.pattern)
        rows = min(self.widest.rows, MOST_ROWS)
        return max(rows // high, 1) * high, max(columns // wide, 1) * wide

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(*shape, device=self.device, generator=generator).to(dtype)


@torch.no_grad()
def measure(probe: Probe) -> Rates:
    """All rates; a few seconds."""
    timed = Timer(probe.device)
    exact = exact_rate(probe, timed)
    return Rates(
        linear=linear_rate(probe, timed),
        moment=moment_rate(probe, timed),
        product=product_rate(probe, timed),
        exact=exact,
        attention=attention_rate(probe, timed),
        factor=factor_rate(probe, timed),
        swept=sweep_rate(probe, timed, exact),
        selected=selection_rate(probe, timed),
        streamed=stream_rate(probe, timed),
        disk=disk_rate(),
        slowdown=timed.slowdown,
    )


class Timer:
    """Seconds of probes, and how they compare with the clock on the wall."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self.own = self.wall = 0.0

    @property
    def slowdown(self) -> float:
        return self.wall / self.own if self.own else 1.0

    def __call__(self, work: Callable[[], object]) -> float:
        """The lower quartile of some repetitions, the first of which warms up and does not count."""
        self._once(work)
        times: list[float] = []
        while len(times) < REPEATS or sum(times) < PATIENCE:
            times.append(self._once(work))
        return max(sorted(times)[len(times) // 4], 1e-9)

    def _once(self, work: Callable[[], object]) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        own, shared, wall = time.thread_time(), time.process_time(), time.perf_counter()
        work()
        if self._cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - wall
        shared = (time.process_time() - shared) / torch.get_num_threads()
        own = wall if self._cuda else min(wall, max(time.thread_time() - own, shared))
        self.own, self.wall = self.own + own, self.wall + wall
        return own


def linear_rate(probe: Probe, timed: Timer) -> float:
    group = probe.widest
    rows = probe.rows(2 * group.size)
    X = probe.random(rows, group.columns, dtype=probe.forward_dtype)
    W = probe.random(group.rows, group.columns, dtype=probe.forward_dtype)
    return linears_forward((group,), rows).linear / timed(lambda: F.linear(X, W))


def moment_rate(probe: Probe, timed: Timer) -> float:
    """The Gram matrix of the widest input."""
    C = probe.deepest
    rows = probe.rows(2 * C**2)
    X, total = probe.random(rows, C), Gram.zeros(C, torch.device(probe.device))
    with products(probe.precision):
        return gram(C, rows).moment / timed(lambda: total.update(X))


def product_rate(probe: Probe, timed: Timer) -> float:
    """Tokens by the largest matrix, in float32 at the run's precision."""
    group = probe.widest
    rows = probe.rows(2 * group.size)
    X, W = probe.random(rows, group.columns), probe.random(group.rows, group.columns)
    with products(probe.precision):
        return product(group.rows, group.columns, rows).product / timed(lambda: X @ W.T)


def exact_rate(probe: Probe, timed: Timer) -> float:
    """(R, C) by (C, C) in float32, the product of the solves."""
    group = probe.widest
    rows = min(probe.rows(2 * group.columns**2), group.rows)
    W, H = probe.random(rows, group.columns), probe.random(group.columns, group.columns)
    with products("float32"):
        return 2 * rows * group.columns**2 / timed(lambda: W @ H)


def attention_rate(probe: Probe, timed: Timer) -> float:
    """Causal, on so many heads as fit the budget."""
    width, S = probe.shape.out.columns if probe.shape.out else probe.head, probe.run.seq_len
    heads = max(1, min(width // probe.head, int(BUDGET / (2 * S * S * probe.head))))
    q = probe.random(1, heads, S, probe.head, dtype=probe.forward_dtype)
    seconds = timed(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True))
    return 2 * S * S * heads * probe.head / seconds


def factor_rate(probe: Probe, timed: Timer) -> float:
    """Cholesky and triangular inverse, as SparseGPT takes them."""
    C = min(probe.deepest, MOST_COLUMNS)
    X = probe.random(2 * C, C)
    H = X.T @ X / len(X)
    done = sparsegpt(SparseGPT(), 0, C).factor
    return done / timed(lambda: inverse_cholesky(H, 0.01))


def sweep_rate(probe: Probe, timed: Timer, exact: float) -> float:
    """Weights a second of SparseGPT's column sweep on a piece of the widest matrix, its products taken off."""
    solver = SparseGPT()
    R, C = probe.piece(2 * solver.column_block)
    W, H = probe.random(R, C), torch.eye(C, device=probe.device)
    seconds = timed(lambda: solver.solve(W, H, probe.pattern))
    cost = sparsegpt(solver, R, C)
    return cost.swept / max(seconds - cost.exact / exact, seconds / 2)


def selection_rate(probe: Probe, timed: Timer) -> float:
    scores = probe.random(*probe.piece(probe.widest.columns)).abs()
    return scores.numel() / timed(lambda: keep_mask(scores, probe.pattern))


def stream_rate(probe: Probe, timed: Timer) -> float:
    """Bytes a second of an activation, a product and a sum over one chunk of the FFN's inner variables."""
    width = probe.deepest
    x = probe.random(min(probe.run.chunk, 2048), width)
    passes = 2 + 3 + 3
    return passes * FLOAT32 * x.numel() / timed(lambda: (F.silu(x) * x) + x)


def disk_rate() -> float:
    """Bytes a second of writing a temporary file and waiting until it is on the disk."""
    data = os.urandom(1 << 20) * (DISK_BYTES >> 20)
    with tempfile.TemporaryFile() as file:
        start = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return DISK_BYTES / (time.perf_counter() - start)
