"""The text of a training run as windows of token ids in a fixed, endless order: where it stands is a step's number.

N = tokens of a text, n = windows of all texts, S = seq_len, B = windows of one step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.errors import DataError


@dataclass(frozen=True)
class Batches:
    """Windows in an order that the seed alone decides, a new one in every epoch."""

    windows: Int[Tensor, "n S"]
    """What is trained on."""
    holdout: Int[Tensor, "h S"]
    """What never is."""
    batch: int
    """B."""
    seed: int

    def at(self, step: int) -> Int[Tensor, "B S"]:
        """The batch of a step, counted from 0."""
        n = len(self.windows)
        places = range(step * self.batch, (step + 1) * self.batch)
        orders = {place // n: self._order(place // n) for place in places}
        return self.windows[[int(orders[place // n][place % n]) for place in places]].long()

    def epochs(self, steps: int) -> float:
        """How often so many steps see a window."""
        return steps * self.batch / len(self.windows)

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.windows), generator=torch.Generator().manual_seed(self.seed + 1 + epoch))


def cut(texts: Sequence[Int[Tensor, " N"]], *, seq_len: int, batch: int, holdout: int, seed: int) -> Batches:
    """Every text in consecutive windows, the last partial one dropped; ``holdout`` of them, drawn by the seed, apart.

    DataError where there are fewer windows than ``holdout`` and one batch.
    """
    rows = [text[: len(text) // seq_len * seq_len].view(-1, seq_len).int() for text in texts]
    windows = torch.cat(rows)
    if len(windows) < holdout + batch:
        raise DataError(
            f"the text holds {sum(map(len, texts))} tokens, {len(windows)} windows of {seq_len}; {holdout} held out "
            f"and one batch of {batch} need {holdout + batch}; give more text, a shorter seq_len or smaller numbers"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return Batches(windows[order[holdout:]], windows[order[:holdout]], batch, seed)
