"""Layer by layer: one forward of the block with hooks gives the moments of every linear, then each group is solved.

This is how SparseGPT and Wanda are published: inside a block all linears see inputs that the dense block makes, while
the block's own inputs come from the pruned blocks before it.
"""

import torch
from torch import Tensor, nn

from secateur.core.moments import ColumnNorms, Gram
from secateur.core.solvers import Solver
from secateur.pruning.work import Precise, Watcher, Work

ACCUMULATORS = {"gram": Gram, "diag": ColumnNorms}


def layerwise(work: Work, solver: Solver, also: dict[nn.Module, Watcher] | None = None) -> None:
    """Prune the planned linears of a block, group by group. ``also`` sees inputs of other modules in the same pass."""
    groups = planned_groups(work)
    moments = observe(work, groups, solver, also or {}) if solver.needs != "nothing" or also else {}
    for linears in groups:
        W, pattern = work.stacked(linears)
        H = moments.get(linears)
        pruned = Precise(solver, work).solve(W, torch.ones(W.shape[1], device=W.device) if H is None else H, pattern)
        work.solved(linears, W, pruned, H)


def planned_groups(work: Work) -> list[tuple[str, ...]]:
    """The linears to prune, grouped by shared input, in the order in which they run."""
    groups = [tuple(name for name in group.linears if name in work.targets) for group in work.layout.groups]
    return [linears for linears in groups if linears]


def observe(
    work: Work, groups: list[tuple[str, ...]], solver: Solver, also: dict[nn.Module, Watcher]
) -> dict[tuple[str, ...], Tensor]:
    """Mean moments of every group's input, from one pass over the hidden states."""
    sums: dict[tuple[str, ...], Gram | ColumnNorms] = {}
    if solver.needs != "nothing":
        kind, device = ACCUMULATORS[solver.needs], torch.device(work.options.device)
        sums = {linears: kind.zeros(work.targets[linears[0]].shape[1], device) for linears in groups}
    watchers: dict[nn.Module, Watcher] = {work.linear(linears[0]): total.update for linears, total in sums.items()}
    for module, watcher in also.items():
        watchers[module] = both(watchers[module], watcher) if module in watchers else watcher
    with work.forwards("observe"):
        work.watched_pass(watchers)
    return {linears: total.mean() for linears, total in sums.items()}


def both(first: Watcher, second: Watcher) -> Watcher:
    def see(X: Tensor) -> None:
        first(X)
        second(X)

    return see
