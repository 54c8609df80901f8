"""One block balanced before it is quantized: ranges of inputs from one pass, s of every fold, folded and verified.

The block computes what it did, up to the order of rounding, since s are powers of two.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.balance import smoothing
from secateur.models.folds import Fold, apply_fold, find_folds
from secateur.pruning.work import PROBE_TOKENS, Work


@dataclass
class Balanced:
    """What could not be folded."""

    refused: list[str] = field(default_factory=list)
    """Full names of sources whose fold the block noticed, or whose readers are not all quantized."""


@dataclass
class Largest:
    """The largest |input| of every channel."""

    values: Float[Tensor, " C"]

    def update(self, X: Tensor) -> None:
        self.values = torch.maximum(self.values, X.detach().abs().flatten(0, -2).amax(dim=0).float())


def smoother(strength: float, told: Balanced) -> Callable[[Work], None]:
    """What balances a block; what it refuses is added to ``told``."""

    def smooth(work: Work) -> None:
        probe = work.hidden[0][:1, :PROBE_TOKENS]
        name = work.adapter.block_names[work.index]
        folds = find_folds(work.block, work.layout, lambda: work.run(probe))
        for fold, s in _settled(work, [fold for fold in folds if _planned(work, fold)], strength).items():
            if apply_fold(work.block, fold, s, lambda: work.run(probe)):
                folds.remove(fold)
        told.refused += [f"{name}.{fold.source}" for fold in folds]

    return smooth


def _planned(work: Work, fold: Fold) -> bool:
    """Whether all linears that would change are to be quantized."""
    changed = (*fold.linears, *({fold.source} & work.linears.keys()))
    return all(linear in work.targets for linear in changed)


def _settled(work: Work, folds: list[Fold], strength: float) -> dict[Fold, Tensor]:
    """Each fold with its s."""
    W = {fold: torch.cat([work.adapter.read(work.linear(name)) for name in fold.linears]) for fold in folds}
    largest = {fold: Largest(torch.zeros_like(W[fold][0])) for fold in folds}
    with work.forwards("balance"):
        for _ in work.outputs({work.linear(fold.linears[0]): seen.update for fold, seen in largest.items()}):
            pass
    return {fold: smoothing(largest[fold].values, W[fold].abs().amax(dim=0), strength) for fold in folds}
