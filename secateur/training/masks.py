"""Choosing the mask of a parameter whose rows may lie in several processes.

N:M and ``row`` patterns choose within rows, which are never cut: nothing travels. Others must see a whole matrix, and
so must all patterns where a matrix is stored (in, out): every process gathers the scores and chooses alike. What a
threshold over all matrices leaves to each is found by counting (``core.allotment``), and only counts travel.

R = out_features, C = in_features; parameters are (..., R, C), or (..., C, R) where ``transposed``.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from secateur.core.allotment import allotted
from secateur.core.pattern import Pattern, Unstructured, by_rows, check_mask, check_shape, keep_mask, kept_count
from secateur.core.row_scales import check_groups
from secateur.errors import UsageError
from secateur.training import shards
from secateur.training.shards import local


def check_carries(parameter: Tensor, pattern: Pattern, *, transposed: bool) -> None:
    """ValueError where the parameter cannot have the pattern."""
    if parameter.ndim < 2:
        raise ValueError(
            f"a pattern is for matrices, got a parameter of shape {tuple(parameter.shape)} (FSDP1 makes such ones: use "
            "FSDP2)"
        )
    R, C = parameter.shape[-2:]
    check_shape((C, R) if transposed else (R, C), pattern)
    shards.check_rows(parameter)


def check_inputs(parameter: Tensor, *, transposed: bool) -> None:
    """UsageError where nobody can tell every process all inputs of the matrix."""
    shape = tuple(parameter.shape)
    if parameter.ndim > 2:
        raise UsageError(
            f"metric wanda must see the inputs of every matrix, and {shape[0]} experts in one tensor of shape {shape} "
            "see theirs inside one kernel; use metric magnitude, fisher or taylor"
        )
    if transposed and shards.is_split(parameter):
        raise UsageError(
            f"metric wanda wants a matrix that is shared out by its outputs, and {shape} is stored as (in, out); use "
            "metric magnitude, fisher or taylor, or do not shard"
        )


def check_scales(parameter: Tensor, n: int, *, transposed: bool) -> None:
    """UsageError where rows cannot have n scales, or a process does not hold whole rows."""
    try:
        check_groups(parameter.shape[-2 if transposed else -1], n)
    except ValueError as error:
        raise UsageError(f"a matrix of shape {tuple(parameter.shape)}: {error}") from error
    if n and transposed and shards.is_split(parameter):
        raise UsageError(
            f"scales want a matrix that is shared out by its outputs, and {tuple(parameter.shape)} is stored as (in, "
            "out); use scales 0, or do not shard"
        )


def check_shares(sparse: Sequence[tuple[Tensor, Pattern]], *, begun: bool) -> None:
    """UsageError where one threshold cannot be for all: other patterns, stacks, matrices that came later."""
    patterns = {pattern for _, pattern in sparse}
    stacks = [tuple(parameter.shape) for parameter, _ in sparse if parameter.ndim != 2]
    plain = all(isinstance(pattern, Unstructured) and pattern.per == "matrix" for pattern in patterns)
    if begun or stacks or len(patterns) > 1 or not plain:
        raise UsageError(
            "scope global wants one unstructured pattern for all matrices, none of them in a stack of experts or added "
            f"later; got {', '.join(map(str, [*patterns, *stacks]))}{', later' * begun}"
        )


def chosen(scores: Tensor, parameter: Tensor, pattern: Pattern, *, transposed: bool) -> Tensor:
    """The mask of this process's rows that keeps the highest scores. Together."""
    seen = _seen(scores, parameter, pattern, transposed)
    masks = [keep_mask(matrix, pattern) for matrix in _matrices(seen)]
    mask = torch.stack(masks).view(seen.shape) if masks else torch.zeros_like(seen, dtype=torch.bool)
    mask = mask.mT.contiguous() if transposed else mask
    return shards.part(mask, parameter) if _gathers(parameter, pattern, transposed) else mask


def shares(scores: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], sparsity: float) -> dict[Tensor, Pattern]:
    """What each matrix is to become where the smallest scores of all go: its own exact count of zeros. Together.

    ``scores`` of the rows at hand are asked for 31 times, in float32 and not negative, and not kept.
    """
    sizes = torch.tensor([parameter.numel() for parameter in parameters])

    def below(bits: int) -> Tensor:
        counts = [shards.total((scores(p).view(torch.int32) < bits).sum(), p) for p in parameters]
        return torch.stack([count.cpu() for count in counts])

    total = int(sizes.sum())
    zeros = allotted(below, sizes, total - kept_count(total, sparsity)).tolist()
    return {p: Unstructured(number / p.numel()) for p, number in zip(parameters, zeros, strict=True)}


def zeros(mask: Tensor) -> int:
    """In all processes. Together."""
    return int(shards.total((~local(mask)).sum(), mask))


def check(parameter: Tensor, pattern: Pattern, *, transposed: bool) -> None:
    """RuntimeError where the parameter's zeros break the pattern. Together."""
    for number, matrix in enumerate(_matrices(_seen(local(parameter) != 0, parameter, pattern, transposed))):
        if broken := check_mask(matrix, pattern):
            raise RuntimeError(f"matrix {number} of a parameter of shape {tuple(parameter.shape)}: {broken}")


def _seen(values: Tensor, parameter: Tensor, pattern: Pattern, transposed: bool) -> Tensor:
    """(..., R, C) as the pattern sees it: this process's rows, or all where it must see all."""
    if _gathers(parameter, pattern, transposed):
        values = shards.whole(shards.like(values, parameter))
    return values.mT if transposed else values


def _gathers(parameter: Tensor, pattern: Pattern, transposed: bool) -> bool:
    """Whether a choice needs more than the rows at hand. The matrices of a stack are never cut."""
    cut = parameter.ndim == 2 and shards.is_split(parameter)
    return cut and (transposed or not by_rows(pattern))


def _matrices(values: Tensor) -> list[Tensor]:
    """Those of a stack (..., R, C); none where a process holds no row."""
    return list(values.unsqueeze(0).flatten(0, -3)) if values.numel() else []
