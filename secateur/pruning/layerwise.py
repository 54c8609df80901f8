"""Layer by layer: one forward of the block with hooks gives the moments of every linear, then each group is solved.

This is how SparseGPT and Wanda are published: inside a block all linears see inputs that the dense block makes, while
the block's own inputs come from the pruned blocks before it. The linears of an expert get the moments of the tokens
routed to it; ``shortage`` says what happens where these are too few.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from secateur.core.solver import LayerSolver
from secateur.pruning.shortage import Pool, Sums, accumulator, top_up
from secateur.pruning.work import Precise, Watcher, Work

Linears = tuple[str, ...]


def layerwise(work: Work, solver: LayerSolver, also: dict[nn.Module, Watcher] | None = None) -> None:
    """Prune the planned linears of a block, group by group. ``also`` sees inputs of other modules in the same pass."""
    groups = planned_groups(work) + expert_groups(work)
    sums, notes = {}, {}
    if solver.needs != "nothing" or also:
        sums, notes = observe(work, groups, solver, also or {})
    solve_groups(work, groups, sums, notes, solver)


def solve_groups(
    work: Work, groups: Iterable[Linears], sums: Sums, notes: dict[Linears, str], solver: LayerSolver
) -> None:
    """Prune each group on the mean moments of its input, and write what comes out."""
    for linears in groups:
        W, pattern = work.stacked(linears)
        observed = sums[linears].observed() if linears in sums else None
        H = observed.H if observed else torch.ones(W.shape[1], device=W.device)
        with work.naming(*linears):
            pruned = Precise(solver, work).solve(W, H, pattern)
        note = "; ".join(filter(None, (notes.get(linears, ""), pruned.note)))
        work.solved(linears, W, pruned._replace(note=note), observed)


def planned_groups(work: Work) -> list[Linears]:
    """The linears to prune, grouped by shared input, in the order in which they run."""
    return _planned(work, (group.linears for group in work.layout.groups))


def expert_groups(work: Work) -> list[Linears]:
    """The same of all experts."""
    return _planned(work, (g for layout in work.experts for member in layout.members for g in member.groups))


def _planned(work: Work, groups: Iterable[Linears]) -> list[Linears]:
    kept = [tuple(name for name in linears if name in work.targets) for linears in groups]
    return [linears for linears in kept if linears]


def observe(
    work: Work, groups: list[Linears], solver: LayerSolver, also: dict[nn.Module, Watcher]
) -> tuple[Sums, dict[Linears, str]]:
    """Moments of every group's input, from one pass over the hidden states; notes on those that had to be topped up."""
    sums: Sums = {}
    if solver.needs != "nothing":
        sums = {linears: accumulator(work, linears, solver.needs) for linears in groups}
    pools = [Pool.of(work, layout) for layout in work.experts] if sums else []
    watchers: dict[nn.Module, Watcher] = {work.linear(linears[0]): total.update for linears, total in sums.items()}
    watchers |= {pool.entrance: pool.see for pool in pools}
    for module, watcher in also.items():
        watchers[module] = both(watchers[module], watcher) if module in watchers else watcher
    with work.forwards("observe"):
        for _ in work.outputs(watchers):
            pass
        for total in sums.values():
            work.combine(total)
        return top_up(work, sums, pools)


def both(first: Watcher, second: Watcher) -> Watcher:
    def see(X: Tensor) -> None:
        first(X)
        second(X)

    return see
