"""What a sparse training starts from and comes to, in numbers."""

import torch

from secateur.training import shards
from secateur.training.optimizer import SparseAdamW
from secateur.training.shards import local


@torch.no_grad()
def left_over(optimizer: SparseAdamW) -> float:
    """Mean distance from zero of the pruned masters. Together."""
    sums = torch.zeros(2, dtype=torch.float64)
    for parameter, state in optimizer.state.items():
        if "mask" in state:
            pruned = local(state["master"])[~local(state["mask"])]
            own = torch.stack([pruned.abs().sum(dtype=torch.float64), pruned.new_tensor(pruned.numel()).double()])
            sums += shards.total(own, parameter).cpu()
    total, count = sums.tolist()
    return total / max(count, 1)
