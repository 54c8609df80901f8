"""Experts that see too few tokens: what their moments are made of, in one place.

A router sends few tokens to some experts and none to others, the more so the shorter the calibration text. Such an
expert is pruned like every other, never skipped: its moments are topped up to ``TOKENS_PER_INPUT`` tokens per input
with tokens of the whole block, as if an average of all that the block sees had been routed to it too. With n of the N
tokens that are wanted,

    H = (n H_own + (N - n) H_pool) / N

so an expert with N tokens or more is pruned on its own tokens alone, one without any on the pool alone, and nothing
jumps in between. H_pool of the first matrices is that of an even sample of all tokens that reach the router. For the
down projection the expert itself is run on that sample: inner activations of *other* experts say nothing, since inner
channel 7 of one expert and inner channel 7 of another have nothing in common. Every expert that was topped up has a
note in its records, which the report lists.

Cost, only where an expert is short: its forward and moments on at most twice ``TOKENS_PER_INPUT`` times as many tokens
as the widest matrix has inputs. The sample waits in host memory.

T = tokens, D = hidden size, C = in_features.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.core.moments import ColumnNorms, Gram
from secateur.core.solver import Needs
from secateur.models.expert_layout import ExpertLayout
from secateur.pruning.work import Work, watching

TOKENS_PER_INPUT = 1
"""Tokens for each input of a matrix below which an expert is short of them. With fewer tokens than inputs a Gram matrix
has no full rank: some directions were never seen, and what is pruned there costs nothing on paper."""
ACCUMULATORS = {"gram": Gram, "diag": ColumnNorms}
Moments = Gram | ColumnNorms
Sums = dict[tuple[str, ...], Moments]
"""Moments of the input that a group of linears shares."""


def accumulator(work: Work, linears: tuple[str, ...], needs: Needs) -> Moments:
    """An empty one, as wide as the group's input, where the block is."""
    return ACCUMULATORS[needs].zeros(work.targets[linears[0]].shape[1], torch.device(work.options.device))


@dataclass
class Pool:
    """An even sample of all tokens that reach the experts of a block."""

    layout: ExpertLayout
    every: int
    """Of so many tokens, one is kept."""
    chunks: list[Float[Tensor, "T D"]] = field(default_factory=list)
    passed: int = 0

    @classmethod
    def of(cls, work: Work, layout: ExpertLayout) -> "Pool":
        """An empty one that will hold TOKENS_PER_INPUT times the widest input of an expert, or up to twice that."""
        widest = max(linear.weight.shape[1] for linears in layout.experts.linears for linear in linears.values())
        return cls(layout, max(1, work.hidden.tokens // (TOKENS_PER_INPUT * widest)))

    @property
    def entrance(self) -> nn.Module:
        return self.layout.experts.entrance

    def see(self, X: Float[Tensor, "*batch D"]) -> None:
        flat = X.flatten(0, -2)
        self.chunks.append(flat[-self.passed % self.every :: self.every].to("cpu"))
        self.passed += len(flat)


def top_up(work: Work, sums: Sums, pools: Sequence[Pool]) -> tuple[Sums, dict[tuple[str, ...], str]]:
    """The moments with those of short experts topped up from the pool, and a note on each of these."""
    notes: dict[tuple[str, ...], str] = {}
    for pool in pools:
        for expert in range(len(pool.layout.members)):
            short = _short(work, pool.layout, expert, sums)
            pooled = _on_pool(work, pool, expert, short)
            for linears, own in short.items():
                wanted = TOKENS_PER_INPUT * work.targets[linears[0]].shape[1]
                notes[linears] = note(own.tokens, wanted)
                sums = sums | {linears: blended(own, pooled[linears], wanted)}
    return sums, notes


def _short(work: Work, layout: ExpertLayout, expert: int, sums: Sums) -> Sums:
    own = set(layout.experts.linears[expert])
    return {
        linears: total
        for linears, total in sums.items()
        if linears[0] in own and total.tokens < TOKENS_PER_INPUT * work.targets[linears[0]].shape[1]
    }


def _on_pool(work: Work, pool: Pool, expert: int, short: Sums) -> Sums:
    """The same moments, had the whole pool been routed to this expert."""
    pooled = {linears: replace(own, sum=torch.zeros_like(own.sum), tokens=0) for linears, own in short.items()}
    with watching({work.linear(linears[0]): total.update for linears, total in pooled.items()}):
        for X in pool.chunks if pooled else ():
            pool.layout.run(expert, X.to(work.options.device))
    for total in pooled.values():
        work.combine(total)
    return pooled


def blended(own: Moments, pooled: Moments, wanted: int) -> Moments:
    """Moments of ``wanted`` tokens: those that were seen, the others as the pool is on average."""
    missing = (wanted - own.tokens) / max(pooled.tokens, 1)
    return replace(own, sum=own.sum + missing * pooled.sum, tokens=wanted)


def note(seen: int, wanted: int) -> str:
    return (
        f"{seen or 'no'} calibration tokens were routed to this expert, {wanted} wanted; its moments were topped up "
        "with tokens of the whole block"
    )
