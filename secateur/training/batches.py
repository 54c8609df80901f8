"""The text of a training run as windows of token ids in a fixed, endless order: where it stands is a step's number.

n = windows of all texts, S = seq_len, B = windows of one step.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.data.sources import Texts
from secateur.data.tokens import eval_windows, tokenize
from secateur.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def windows_of_all(texts: Iterable[Texts], tokenizer: "PreTrainedTokenizerBase", seq_len: int) -> Int[Tensor, "n S"]:
    """Every text in consecutive windows, the last partial one dropped. DataError where a text is shorter than one."""
    windows = [eval_windows(tokenize(text, tokenizer), seq_len, name=text.name) for text in texts]
    return torch.cat(windows).int()


def cut(windows: Int[Tensor, "n S"], *, batch: int, holdout: int, seed: int) -> Batches:
    """``holdout`` windows, drawn by the seed, apart. DataError where that leaves less than one batch."""
    if len(windows) < holdout + batch:
        raise DataError(
            f"the text holds {len(windows)} windows of {windows.shape[1]} tokens; {holdout} held out and one batch of "
            f"{batch} need {holdout + batch}; give more text, a shorter seq_len or smaller numbers"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return Batches(windows[order[holdout:]], windows[order[:holdout]], batch, seed)
