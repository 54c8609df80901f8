"""Which weights may be zero: a pattern is a value, never a string or a pair with a magic zero.

Three families, one function: ``keep_mask(scores, pattern)`` keeps the highest scores and returns a bool mask, True =
kept. The count is exact and ties are broken by position (the weight further up, then further left, is kept), so that
the same scores always give the same mask and the achieved sparsity is what was asked for to the single weight.

N:M counts the weights that are KEPT: 1:4 keeps one of every four (75 % zeros). SparseLLM's paper and SparseGPT's code
count the pruned ones and would call that 3:4; equal only where both halves match (2:4, 4:8).

R = out_features, C = in_features. Masks are bool, True = kept. Sparsity is the share of zeros, in [0, 1).
"""

import math
import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor


def _check_sparsity(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the share of zeros, at least 0 and below 1; got {sparsity} (70 % is 0.7)")


def _percent(sparsity: float) -> str:
    return f"{100 * sparsity:.6g}%"


@dataclass(frozen=True)
class Unstructured:
    """Any weight may be zero; the exact count of zeros is round(sparsity * size)."""

    sparsity: float
    """Share of zeros, in [0, 1)."""
    per: Literal["matrix", "row"] = "matrix"
    """Where the count holds: over the whole matrix, or in every output row (Wanda's choice)."""

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        if self.per not in ("matrix", "row"):
            raise ValueError(f"per must be 'matrix' or 'row', got {self.per!r}")

    def __str__(self) -> str:
        return _percent(self.sparsity) + (" per row" if self.per == "row" else "")

    def words(self) -> str:
        where = "every output row" if self.per == "row" else "each matrix"
        return f"{_percent(self.sparsity)} of the weights of {where} are zero"


@dataclass(frozen=True)
class NM:
    """n weights KEPT in every m consecutive inputs of every output row."""

    n: int
    """Kept in each group, 1 <= n < m."""
    m: int
    """Group length along the input dimension; must divide in_features."""

    def __post_init__(self) -> None:
        if not 1 <= self.n < self.m:
            raise ValueError(f"N:M keeps N of every M weights and needs 1 <= N < M, got {self.n}:{self.m}")

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def words(self) -> str:
        return f"keep {self.n} of every {self.m} weights ({_percent(self.sparsity)} zeros)"


@dataclass(frozen=True)
class Block:
    """Whole rows x cols tiles are zero or kept; a tile's score is the sum of its weights' scores."""

    sparsity: float
    """Share of zero tiles, in [0, 1)."""
    rows: int
    """Tile height; must divide out_features."""
    cols: int
    """Tile width; must divide in_features."""

    def __post_init__(self) -> None:
        _check_sparsity(self.sparsity)
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"a block needs at least one row and one column, got {self.rows}x{self.cols}")

    def __str__(self) -> str:
        return f"{_percent(self.sparsity)} in {self.rows}x{self.cols} blocks"

    def words(self) -> str:
        return f"{_percent(self.sparsity)} of the {self.rows}x{self.cols} blocks are zero"


@dataclass(frozen=True)
class Stacked:
    """Matrices that share one input, stacked by rows and solved at once; each keeps its own pattern and count."""

    parts: tuple[tuple[int, "Unstructured | NM | Block"], ...]
    """(rows, pattern) from top to bottom; the rows add up to the stacked matrix."""

    @property
    def sparsity(self) -> float:
        return sum(rows * pattern.sparsity for rows, pattern in self.parts) / sum(rows for rows, _ in self.parts)

    def __str__(self) -> str:
        return " + ".join(dict.fromkeys(str(pattern) for _, pattern in self.parts))


Pattern = Unstructured | NM | Block
_KINDS: dict[str, type[Pattern]] = {"unstructured": Unstructured, "n:m": NM, "block": Block}
VALUE_BITS = 16.0
"""Of a weight, or any other number, that is stored."""
SAMPLE_STRIDE = 61
"""One score in so many guides the selection of the k-th largest; prime, so that no column structure is hit in step."""
_NM_TEXT = re.compile(r"(\d+):(\d+)")
_BLOCK_TEXT = re.compile(r"block:(\d+)x(\d+)")


def parts_of(pattern: Pattern | Stacked) -> list[Pattern]:
    """The patterns of stacked matrices, or the one of a single matrix."""
    return [part for _, part in pattern.parts] if isinstance(pattern, Stacked) else [pattern]


def by_rows(pattern: Pattern | Stacked) -> bool:
    """Whether every output row is pruned for itself."""
    return all(
        isinstance(part, NM) or (isinstance(part, Unstructured) and part.per == "row") for part in parts_of(pattern)
    )


def make_pattern(structure: str = "unstructured", sparsity: float | None = None) -> Pattern:
    """The pattern behind two words a user types: a structure and a share of zeros.

    structure is "unstructured", "row", "N:M" (N kept) or "block:RxC". ValueError where they contradict each other.
    """
    if found := _NM_TEXT.fullmatch(structure):
        pattern = NM(int(found[1]), int(found[2]))
        if sparsity is not None and abs(sparsity - pattern.sparsity) > 1e-9:
            raise ValueError(
                f"{structure} means {pattern.words()}, which contradicts sparsity {sparsity}; give one of the two"
            )
        return pattern
    block = _BLOCK_TEXT.fullmatch(structure)
    if block is None and structure not in ("unstructured", "row"):
        raise ValueError(f"unknown pattern {structure!r}; wanted 'unstructured', 'row', 'N:M' like 2:4, or 'block:RxC'")
    if sparsity is None:
        raise ValueError(f"pattern {structure!r} needs a sparsity, the share of zeros (0.5 for 50 %)")
    if block:
        return Block(sparsity, int(block[1]), int(block[2]))
    return Unstructured(sparsity, "row" if structure == "row" else "matrix")


def pattern_to_dict(pattern: Pattern) -> dict[str, Any]:
    """JSON form, with the family under "kind"."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(pattern, cls))
    return {"kind": kind, **asdict(pattern)}


def pattern_from_dict(data: dict[str, Any]) -> Pattern:
    """Inverse of ``pattern_to_dict``; ValueError for an unknown kind or field."""
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"unknown pattern kind {kind!r}; known: {', '.join(_KINDS)}")
    try:
        return _KINDS[kind](**fields)
    except TypeError as error:
        raise ValueError(f"pattern of kind {kind!r} does not take these fields: {error}") from None


def check_shape(shape: tuple[int, int], pattern: Pattern) -> None:
    """ValueError where an (R, C) matrix cannot carry the pattern."""
    R, C = shape
    if isinstance(pattern, NM) and C % pattern.m:
        raise ValueError(
            f"{pattern} needs in_features divisible by {pattern.m}, got {C}; choose another M or exclude this linear"
        )
    if isinstance(pattern, Block) and (R % pattern.rows or C % pattern.cols):
        raise ValueError(
            f"{pattern.rows}x{pattern.cols} blocks need a matrix divisible by them, got {R}x{C}; choose other blocks"
        )


def kept_count(size: int, sparsity: float) -> int:
    """How many of ``size`` entries stay when round(sparsity * size), halves up, are zero."""
    return size - math.floor(sparsity * size + 0.5)


def zeros_in(shape: tuple[int, int], pattern: Pattern) -> int:
    """How many of an (R, C) matrix's weights ``keep_mask`` leaves out: rounded where the pattern counts."""
    R, C = shape
    match pattern:
        case NM(n, m):
            return R * C // m * (m - n)
        case Unstructured(sparsity, "row"):
            return R * (C - kept_count(C, sparsity))
        case Unstructured(sparsity, _):
            return R * C - kept_count(R * C, sparsity)
        case Block(sparsity, rows, cols):
            tiles = R // rows * (C // cols)
            return rows * cols * (tiles - kept_count(tiles, sparsity))


def _keep_largest(scores: Float[Tensor, "rows n"], keep: int) -> Bool[Tensor, "rows n"]:
    """The ``keep`` largest of every row; of equal scores the one further left stays."""
    rows, n = scores.shape
    if keep == n:
        return torch.ones(rows, n, dtype=torch.bool, device=scores.device)
    if keep == 0:
        return torch.zeros(rows, n, dtype=torch.bool, device=scores.device)
    if n <= 16:
        return _rank(scores) < keep
    threshold = _kth_largest(scores[0], keep) if rows == 1 else scores.kthvalue(n - keep + 1, 1, keepdim=True).values
    kept = scores >= threshold
    if int(torch.count_nonzero(kept)) == keep * rows:  # no ties at the threshold
        return kept
    above, tied = scores > threshold, scores == threshold
    room = keep - above.sum(dim=1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=1) <= room))


def _rank(scores: Float[Tensor, "rows n"]) -> Integer[Tensor, "rows n"]:
    """How many of its row come before each score; every pair is compared once, which suits the short rows of N:M."""
    columns = scores.T.contiguous()
    rank = torch.zeros_like(columns, dtype=torch.uint8)
    for right in range(1, len(columns)):
        for left in range(right):
            behind = columns[left] >= columns[right]
            rank[right] += behind
            rank[left] += ~behind
    return rank.T


def _kth_largest(scores: Float[Tensor, " n"], k: int) -> Float[Tensor, ""]:
    """The k-th largest score, exactly: a sample brackets it, and only what lies inside the bracket is selected from.

    Some passes of comparisons instead of a selection over the whole matrix, which torch does on one core.
    """
    n = len(scores)
    sample = scores[::SAMPLE_STRIDE].sort(descending=True).values
    rank, margin = k * len(sample) // n, 4 * int(len(sample) ** 0.5) + 1
    if rank - margin >= 0 and rank + margin < len(sample):
        high, low = sample[rank - margin], sample[rank + margin]
        inside, above = scores[(scores >= low) & (scores <= high)], int(torch.count_nonzero(scores > high))
        if above < k <= above + len(inside):
            return inside.kthvalue(len(inside) - (k - above) + 1).values
    return scores.kthvalue(n - k + 1).values


def _keep_tiles(scores: Float[Tensor, "R C"], pattern: Block, start: int) -> Bool[Tensor, "R C"]:
    R, C = scores.shape
    tiles = scores.reshape(R // pattern.rows, pattern.rows, C // pattern.cols, pattern.cols).sum(dim=(1, 3))
    keep = _kept_between(tiles.shape[0], start // pattern.cols, tiles.shape[1], pattern.sparsity)
    kept = _keep_largest(tiles.reshape(1, -1), keep).reshape(tiles.shape)
    return kept.repeat_interleave(pattern.rows, dim=0).repeat_interleave(pattern.cols, dim=1)


def _kept_between(rows: int, start: int, width: int, sparsity: float) -> int:
    """Entries kept in ``width`` columns after ``start``, such that consecutive slices add up to the exact total."""
    return kept_count(rows * (start + width), sparsity) - kept_count(rows * start, sparsity)


def keep_mask(scores: Float[Tensor, "R C"], pattern: Pattern | Stacked, start: int = 0) -> Bool[Tensor, "R C"]:
    """True where a weight stays: the highest scores, in exactly the count that the pattern asks for.

    ``scores`` may be a slice of a wider matrix's columns that begins at column ``start``: masks of consecutive slices
    add up to the exact count of the whole (a column sweep decides slice by slice).
    Raises ValueError where the shape cannot carry the pattern or a score is NaN.
    """
    if isinstance(pattern, Stacked):
        pieces = scores.split([rows for rows, _ in pattern.parts])
        return torch.cat([keep_mask(s, p, start) for s, (_, p) in zip(pieces, pattern.parts, strict=True)])
    R, C = scores.shape
    check_shape((R, C), pattern)
    if scores.sum().isnan() and scores.isnan().any():  # the first is a fraction of the cost of the second
        raise ValueError(f"{int(torch.isnan(scores).sum())} of {scores.numel()} scores are NaN; check the weights")
    match pattern:
        case NM(n, m):
            return _keep_largest(scores.reshape(-1, m), n).reshape(R, C)
        case Unstructured(sparsity, "row"):
            return _keep_largest(scores, _kept_between(1, start, C, sparsity))
        case Unstructured(sparsity, _):
            return _keep_largest(scores.reshape(1, -1), _kept_between(R, start, C, sparsity)).reshape(R, C)
        case Block():
            return _keep_tiles(scores, pattern, start)


def check_mask(mask: Bool[Tensor, "R C"], pattern: Pattern) -> str | None:
    """None where the mask keeps the pattern's promise, else one line that says how it is broken.

    At most the promised count may be non-zero: a kept weight that happens to be 0.0 breaks nothing.
    """
    check_shape((mask.shape[0], mask.shape[1]), pattern)
    match pattern:
        case NM(n, m):
            bad = int((mask.reshape(-1, m).sum(dim=1) > n).sum())
            return f"{bad} of {mask.numel() // m} groups of {m} hold more than {n} weights" if bad else None
        case Unstructured(sparsity, "row"):
            bad = int((mask.sum(dim=1) > kept_count(mask.shape[1], sparsity)).sum())
            return f"{bad} of {mask.shape[0]} rows hold fewer than {_percent(sparsity)} zeros" if bad else None
        case Unstructured(sparsity, _):
            kept, wanted = int(mask.sum()), kept_count(mask.numel(), sparsity)
            return f"{kept} weights are not zero, {wanted} were promised" if kept > wanted else None
        case Block(sparsity, rows, cols):
            R, C = mask.shape
            tiles = mask.reshape(R // rows, rows, C // cols, cols).any(dim=3).any(dim=1)
            kept, wanted = int(tiles.sum()), kept_count(tiles.numel(), sparsity)
            return f"{kept} blocks are not zero, {wanted} were promised" if kept > wanted else None


def ramped(pattern: Pattern | Stacked, progress: float) -> Pattern | Stacked:
    """The pattern on its way: sparsity s (1 - (1 - progress)³), progress in [0, 1]; N:M stays as it is."""
    match pattern:
        case Stacked(parts):
            return Stacked(tuple((rows, ramped(part, progress)) for rows, part in parts))  # pyright: ignore[reportArgumentType]
        case NM():
            return pattern
        case _:
            return replace(pattern, sparsity=pattern.sparsity * (1 - (1 - progress) ** 3))


def tapered(pattern: Pattern, depth: float, taper: float) -> Pattern:
    """The pattern of one block: sparsity rises evenly with depth, from ``taper`` below the pattern's own to as much
    above it (ATP, arXiv:2502.14770: an arithmetic progression, since later blocks carry on what early ones lose).

    ``depth``: 0 is the first block, 1 the last. ValueError for N:M and where a sparsity would not lie in [0, 1).
    """
    if not taper:
        return pattern
    if isinstance(pattern, NM):
        raise ValueError(f"taper moves zeros from early blocks to late ones; {pattern} has as many in all, leave it 0")
    first, last = pattern.sparsity - taper, pattern.sparsity + taper
    if min(first, last) < 0 or max(first, last) >= 1:
        raise ValueError(
            f"taper {taper} lets a sparsity of {pattern.sparsity} go from {first:.6g} to {last:.6g}; keep it in [0, 1)"
        )
    return replace(pattern, sparsity=first + (last - first) * depth)


def tapered_words(pattern: Pattern, taper: float) -> str:
    """The pattern in words, over all blocks."""
    if not taper:
        return pattern.words()
    first, last = (_percent(tapered(pattern, depth, taper).sparsity) for depth in (0.0, 1.0))
    return f"{pattern.words()} on the average, {first} in the first block to {last} in the last"


def bits_per_weight(pattern: Pattern) -> float:
    """16 bit for each kept weight, and where it is: a bit a weight or a tile; N:M the shorter of mask and index."""
    kept = VALUE_BITS * (1 - pattern.sparsity)
    match pattern:
        case NM(n, m):
            return kept + min(1.0, n / m * math.ceil(math.log2(m)))
        case Block(_, rows, cols):
            return kept + 1 / (rows * cols)
        case _:
            return kept + 1.0
