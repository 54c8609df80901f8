"""Layer by layer: one forward of the block with hooks gives the moments of every linear, then each group is solved.

This is how SparseGPT and Wanda are published: inside a block all linears see inputs that the dense block makes, while the
block's own inputs come from the pruned blocks before it.
"""

import torch
from torch import Tensor

from secateur.core.moments import ColumnNorms, Gram
from secateur.core.solvers import Solver
from secateur.pruning.work import Precise, Work, watching

ACCUMULATORS = {"gram": Gram, "diag": ColumnNorms}


def layerwise(work: Work, solver: Solver) -> None:
    """Prune the planned linears of a block, group by group."""
    groups = planned_groups(work)
    moments = observe(work, groups, solver) if solver.needs != "nothing" else {}
    for linears in groups:
        W, pattern = work.stacked(linears)
        H = moments.get(linears)
        pruned = Precise(solver, work).solve(W, torch.ones(W.shape[1], device=W.device) if H is None else H, pattern)
        work.solved(linears, W, pruned, H)


def planned_groups(work: Work) -> list[tuple[str, ...]]:
    """The linears to prune, grouped by shared input, in the order in which they run."""
    groups = [tuple(name for name in group.linears if name in work.targets) for group in work.layout.groups]
    return [linears for linears in groups if linears]


def observe(work: Work, groups: list[tuple[str, ...]], solver: Solver) -> dict[tuple[str, ...], Tensor]:
    """Mean moments of every group's input, from one pass over the hidden states."""
    kind = ACCUMULATORS[solver.needs]
    device = torch.device(work.options.device)
    sums = {linears: kind.zeros(work.targets[linears[0]].shape[1], device) for linears in groups}
    with work.forwards("observe"), watching({work.linear(ls[0]): total.update for ls, total in sums.items()}):
        for rows in work.hidden:
            work.run(rows)
    return {linears: total.mean() for linears, total in sums.items()}
