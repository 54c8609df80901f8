"""The numbers a quantized weight may take: codes times a scale, and zero is always one of them.

A weight w is stored as an integer code q and read back as (q - z) s: a scale s and a zero point z for each group of
consecutive inputs of an output row, or for the whole row. Symmetric grids have z = 0; asymmetric ones put the codes
where the weights are, and z is an integer, so that a weight of 0 has the code z and comes back as exactly +0.0. No
method here can lose a zero: rounding a weight that is 0 gives 0, whatever the scale.

Scales minimise the squared rounding error of their group over a ladder of shrunken ranges: clipping a few large weights
makes the steps of all others finer, at 3 bits by a lot. They are rounded to the type they are stored in before any code
is chosen, so that what a file says is what was computed with.

R = out_features, C = in_features, g = group_size, G = C / g scales of a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int8
from torch import Tensor

BITS = {8: ("channel",), 4: ("channel", 32, 64, 128), 3: ("channel", 32, 64, 128)}
"""Bits of a code, and what may share one scale: a row ("channel"), or so many consecutive inputs of it."""
SHRINK = tuple(1 - 0.05 * step for step in range(13))
"""Shares of the full range that are tried, from all of it down to 40 %."""
PIECE = 1 << 20
"""Weights whose scales are searched at one time: what is compared is three times as large."""
LEAST = {torch.float16: 2.0**-20}
"""Smallest scale, where the smallest normal number, 6e-5, would be a coarse step for a row of small weights."""
RoundColumn = Callable[[Float[Tensor, " R"], int], Float[Tensor, " R"]]
"""(a column, its number in the matrix) -> the column on the grid."""


@dataclass(frozen=True)
class Scheme:
    """How a matrix is quantized. ValueError for what no format here holds."""

    bits: int
    """Of a code: 8, 4 or 3."""
    group_size: int = 0
    """Consecutive inputs that share a scale: 32, 64 or 128; 0 = all inputs of an output row."""
    symmetric: bool = True
    """False = a zero point for every scale; not at 8 bits."""
    scales: torch.dtype = torch.float32
    """Type that scales are stored in."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"{self.bits} bits are not in the table; known: {', '.join(map(str, BITS))}")
        known = BITS[self.bits]
        if (self.group_size or "channel") not in known:
            raise ValueError(
                f"{self.bits} bits with group size {self.group_size or 'channel'} are not in the table; known for "
                f"{self.bits} bits: {', '.join(map(str, known))}"
            )
        if not self.symmetric and self.bits == 8:
            raise ValueError("8 bits are symmetric always; asymmetric grids are for 4 and 3 bits")

    @property
    def lowest(self) -> int:
        return -(1 << (self.bits - 1))

    @property
    def highest(self) -> int:
        return (1 << (self.bits - 1)) - 1

    def width(self, C: int) -> int:
        """Inputs that share a scale, of a row with C."""
        return self.group_size or C

    def check(self, C: int) -> None:
        """ValueError where the groups do not divide a row."""
        if C % self.width(C):
            raise ValueError(
                f"group size {self.group_size} does not divide {C} inputs; take a smaller one, or channel, or ignore "
                "this linear"
            )

    def words(self) -> str:
        where = f"groups of {self.group_size}" if self.group_size else "one scale an output row"
        return f"int{self.bits}, {where}, {'symmetric' if self.symmetric else 'asymmetric, zero kept'}"


class Grid(NamedTuple):
    """Scales and zero points of some rows' groups, both as float32; zero points hold integers."""

    scale: Float[Tensor, "R G"]
    zero_point: Float[Tensor, "R G"]

    def split(self, sizes: list[int]) -> list["Grid"]:
        """The grids of stacked matrices."""
        return [Grid(*pair) for pair in zip(self.scale.split(sizes), self.zero_point.split(sizes), strict=True)]


def fit_grid(W: Float[Tensor, "R C"], scheme: Scheme, weight: Float[Tensor, " C"] | None = None) -> Grid:
    """Scales of the least squared rounding error; ``weight`` says how much each input counts (diag H, say)."""
    rows = max(1, PIECE // max(W.shape[1], 1))
    grids = [_fit(piece, scheme, weight) for piece in W.split(rows)]
    return Grid(torch.cat([grid.scale for grid in grids]), torch.cat([grid.zero_point for grid in grids]))


def _fit(W: Float[Tensor, "R C"], scheme: Scheme, weight: Float[Tensor, " C"] | None) -> Grid:
    groups = _grouped(W, scheme)
    low, high = groups.amin(dim=2).clamp(max=0), groups.amax(dim=2).clamp(min=0)
    best = _ranged(low, high, scheme)
    least = torch.full_like(best.scale, torch.inf)
    for share in SHRINK:
        grid = _ranged(share * low, share * high, scheme)
        lost = (on_grid(W, grid, scheme) - W).square()
        lost = _grouped(lost if weight is None else lost * weight, scheme).sum(dim=2)
        better = lost < least
        least = torch.where(better, lost, least)
        best = Grid(*(torch.where(better, new, old) for new, old in zip(grid, best, strict=True)))
    return best


def _ranged(low: Float[Tensor, "R G"], high: Float[Tensor, "R G"], scheme: Scheme) -> Grid:
    """The grid that reaches from low <= 0 to high >= 0; 1 where there is nothing to reach."""
    if scheme.symmetric:
        scale = torch.maximum(-low, high) / scheme.highest
    else:
        scale = (high - low) / (scheme.highest - scheme.lowest)
    least = LEAST.get(scheme.scales, torch.finfo(scheme.scales).tiny)
    scale = torch.where(scale > 0, scale.clamp(min=least), torch.ones_like(scale)).to(scheme.scales).to(low.dtype)
    if scheme.symmetric:
        return Grid(scale, torch.zeros_like(scale))
    return Grid(scale, (scheme.lowest - low / scale).round().clamp(scheme.lowest, scheme.highest))


def to_codes(W: Float[Tensor, "R C"], grid: Grid, scheme: Scheme) -> Int8[Tensor, "R C"]:
    """The nearest code of every weight; halves go to the even one."""
    codes = _codes(_grouped(W, scheme), grid.scale[..., None], grid.zero_point[..., None], scheme)
    return codes.view(W.shape).to(torch.int8)


def on_grid(W: Float[Tensor, "R C"], grid: Grid, scheme: Scheme) -> Float[Tensor, "R C"]:
    """Every weight at its nearest value on the grid."""
    s, z = grid.scale[..., None], grid.zero_point[..., None]
    return ((_codes(_grouped(W, scheme), s, z, scheme) - z) * s).view(W.shape)


def column_rounder(grid: Grid, scheme: Scheme, start: int, C: int) -> RoundColumn:
    """Rounds one column at a time, by its number in the whole matrix, to a grid whose first group holds ``start``."""
    scales, zeros = grid.scale.unbind(dim=1), grid.zero_point.unbind(dim=1)
    width = scheme.width(C)

    def rounded(w: Float[Tensor, " R"], j: int) -> Float[Tensor, " R"]:
        s, z = scales[(j - start) // width], zeros[(j - start) // width]
        return (_codes(w, s, z, scheme) - z) * s

    return rounded


def _codes(w: Tensor, s: Tensor, z: Tensor, scheme: Scheme) -> Tensor:
    return (w / s + z).round_().clamp_(scheme.lowest, scheme.highest)


def _grouped(W: Float[Tensor, "R C"], scheme: Scheme) -> Float[Tensor, "R G g"]:
    R, C = W.shape
    scheme.check(C)
    width = scheme.width(C)
    return W.reshape(R, C // width, width)
