"""Processes that prune one model together: each has a share of the calibration rows and of the rows of every solve.

    torchrun --nproc-per-node 4 -m secateur prune MODEL ...

Rank r of N has the r-th part of the rows, in order. Sums over tokens are added over all ranks, so every rank solves on
the moments of the whole text. Where the rows of a matrix are pruned independently of each other (N:M, row) each rank
solves its part of them, otherwise the first rank solves for all; either way all ranks end with the same bits. Hidden
states never travel.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.core.moments import Moments
from secateur.core.pattern import Pattern, Stacked
from secateur.errors import DeviceError, ProcessError, first_line

PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others: the first may solve alone, or write."""


class Ranks:
    """This process alone: nothing to add, to share or to wait for."""

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, total: int) -> range:
        """This process's part of so many rows; parts differ by one row at most."""
        return range(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def add(self, tensor: Tensor) -> None:
        """The sum over all processes, in place."""

    def combine(self, moments: Moments) -> None:
        """Moments of the tokens of all processes, in place."""

    def same(self, tensor: Tensor) -> Tensor:
        """The first process's, in all; of one shape everywhere."""
        return tensor

    def together(self, rows: Tensor, total: int) -> Tensor:
        """All rows of a tensor whose ``share(total)`` each process has."""
        return rows

    def each(self, number: int) -> list[int]:
        """What every process says, in order; waits until all have."""
        return [number]

    def total(self, number: int) -> int:
        """The sum over all processes."""
        return sum(self.each(number))


ALONE = Ranks()


class Group(Ranks):
    """The processes of torch.distributed's default group."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def add(self, tensor: Tensor) -> None:
        with _heard():
            dist.all_reduce(tensor)

    def combine(self, moments: Moments) -> None:
        self.add(moments.sum)
        moments.tokens = self.total(moments.tokens)

    def same(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        with _heard():
            dist.broadcast(tensor, src=0)
        return tensor

    def together(self, rows: Tensor, total: int) -> Tensor:
        everything = rows.new_zeros(total, *rows.shape[1:])
        own = self.share(total)
        everything[own.start : own.stop] = rows
        self.add(everything)  # one part and zeros: exact
        return everything

    def each(self, number: int) -> list[int]:
        numbers: list[int] = [0] * self.size
        with _heard():
            dist.all_gather_object(numbers, number)
        return numbers


@contextmanager
def _heard() -> Iterator[None]:
    """ProcessError where another process does not answer any more."""
    try:
        yield
    except RuntimeError as error:
        gone = f"another process of this run is gone ({first_line(error)})"
        raise ProcessError(f"{gone}; start all again with --resume") from error


def pattern_of_rows(pattern: Pattern | Stacked, rows: range) -> Pattern | Stacked:
    """That of some of the rows of a matrix, or of several stacked ones."""
    if not isinstance(pattern, Stacked):
        return pattern
    parts, top = [], 0
    for count, part in pattern.parts:
        inside = min(top + count, rows.stop) - max(top, rows.start)
        parts += [(inside, part)] if inside > 0 else []
        top += count
    return Stacked(tuple(parts))


@contextmanager
def launched() -> Iterator[Ranks]:
    """The ranks that torchrun started, as its environment tells; this process alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    if torch.cuda.is_available():
        raise DeviceError("several processes share a run on CPUs only so far; start one process, without torchrun")
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield Group()
    finally:
        dist.destroy_process_group()
