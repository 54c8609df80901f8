"""What a cost is made of, before any number is known: the matrices of a block by their role, and the calibration.

Experts of one kind stand for themselves ``count`` times, each on its ``share`` of the tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

from secateur.pruning.ffn import HELD_OUT


class Shared(NamedTuple):
    """Linears of a block that read one input."""

    rows: int
    """Their out_features added up: R of the stacked matrix."""
    columns: int
    planned: int
    """Rows of those that are to be pruned."""

    @property
    def size(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Routed:
    """Experts of a block that are alike, FFNs of their own for the tokens routed to them."""

    first: Shared
    down: Shared
    count: int
    share: float
    """Of all tokens, what each of them sees."""

    @property
    def groups(self) -> tuple[Shared, Shared]:
        return self.first, self.down

    @property
    def planned(self) -> bool:
        return any(group.planned for group in self.groups)

    @property
    def widest(self) -> int:
        return max(group.columns for group in self.groups)


@dataclass(frozen=True)
class BlockShape:
    """The matrices of a block by their role."""

    attention: tuple[Shared, ...]
    """What runs before the attention's output projection; in a block whose roles are unknown, all of it."""
    out: Shared | None
    first: Shared | None
    """Up, or gate and up."""
    down: Shared | None
    experts: tuple[Routed, ...] = ()

    @property
    def matrices(self) -> tuple[Shared, ...]:
        """All groups, one of each kind of experts."""
        return (*self.groups, *(group for one in self.experts for group in one.groups))

    @property
    def groups(self) -> tuple[Shared, ...]:
        """Those that see every token."""
        return (*self.attention, *(group for group in (self.out, self.first, self.down) if group))

    @property
    def hidden(self) -> int:
        return self.groups[0].columns

    @property
    def planned(self) -> bool:
        return any(group.planned for group in self.matrices)

    @property
    def size(self) -> int:
        """Weights of all matrices."""
        return sum(g.size for g in self.groups) + sum(r.count * g.size for r in self.experts for g in r.groups)


class Run(NamedTuple):
    """The calibration and how it is computed."""

    samples: int
    seq_len: int
    batch: int
    rounded: bool
    """Float32 weights and 16-bit products: every chunk casts the weights anew."""

    @property
    def tokens(self) -> int:
        return self.samples * self.seq_len

    @property
    def chunk(self) -> int:
        return min(self.batch, self.samples) * self.seq_len

    @property
    def held(self) -> int:
        """Tokens that judge an FFN's iterates."""
        return self.tokens // HELD_OUT

    @property
    def fitted(self) -> int:
        """Tokens that the FFN's fits see."""
        return self.tokens - self.held
