"""One block balanced before it is quantized: moments of inputs from one pass, s of every fold, folded and verified.

The block computes what it did, up to the order of rounding, since s are powers of two.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.balance import searched, smoothing
from secateur.core.grid import Scheme
from secateur.core.moments import Gram
from secateur.models.folds import Fold, apply_fold, find_folds
from secateur.pruning.work import PROBE_TOKENS, Work


class Balance(Protocol):
    """What is to be known of a fold's inputs, and the s that follows from it."""

    def seen(self, C: int, device: torch.device) -> "Largest | Gram": ...
    def settle(self, W: Float[Tensor, "R C"], seen: "Largest | Gram") -> Float[Tensor, " C"]: ...


@dataclass
class Largest:
    """The largest |input| of every channel."""

    values: Float[Tensor, " C"]

    def update(self, X: Tensor) -> None:
        self.values = torch.maximum(self.values, X.detach().abs().flatten(0, -2).amax(dim=0).float())

    def mean(self) -> Float[Tensor, " C"]:
        return self.values


@dataclass(frozen=True)
class Smooth:
    """SmoothQuant, beside 8 bit inputs."""

    strength: float
    """How much of the inputs' range goes into the weights."""

    def seen(self, C: int, device: torch.device) -> Largest:
        return Largest(torch.zeros(C, device=device))

    def settle(self, W: Float[Tensor, "R C"], seen: Largest | Gram) -> Float[Tensor, " C"]:
        return smoothing(seen.mean(), W.abs().amax(dim=0), self.strength)


@dataclass(frozen=True)
class Searched:
    """AWQ, for weights alone."""

    scheme: Scheme
    weighted: bool
    """Whether the solver to come has inputs count in its scales."""

    def seen(self, C: int, device: torch.device) -> Gram:
        return Gram.zeros(C, device)

    def settle(self, W: Float[Tensor, "R C"], seen: Largest | Gram) -> Float[Tensor, " C"]:
        return searched(W, seen.mean(), self.scheme, weighted=self.weighted)


def balance_block(balance: Balance, work: Work) -> None:
    """Fold what can be folded, and note the rest."""
    probe = work.hidden[0][:1, :PROBE_TOKENS]
    name = work.adapter.block_names[work.index]
    folds = find_folds(work.block, work.layout, lambda: work.run(probe))
    for fold, s in _settled(work, [fold for fold in folds if _planned(work, fold)], balance).items():
        if apply_fold(work.block, fold, s, probe, lambda: work.run(probe)):
            folds.remove(fold)
    work.refused += [f"{name}.{fold.source}" for fold in folds]


def _planned(work: Work, fold: Fold) -> bool:
    """Whether all linears that would change are to be quantized."""
    changed = (*fold.linears, *({fold.source} & work.linears.keys()))
    return all(linear in work.targets for linear in changed)


def _settled(work: Work, folds: list[Fold], balance: Balance) -> dict[Fold, Tensor]:
    """Each fold with its s."""
    W = {fold: torch.cat([work.adapter.read(work.linear(name)) for name in fold.linears]) for fold in folds}
    seen = {fold: balance.seen(W[fold].shape[1], W[fold].device) for fold in folds}
    with work.forwards("balance"):
        for _ in work.outputs({work.linear(fold.linears[0]): moments.update for fold, moments in seen.items()}):
            pass
    return {fold: balance.settle(W[fold], seen[fold]) for fold in folds}
