"""Recovery by adapters that keep every zero: W + mask ⊙ (B A) scale, of which A and B alone are trained.

    parameters = start_lora(model, masks, rank=8, scale=1.0, generator=generator)
    optimizer = SparseAdamW([{"params": parameters}], ...)
    ...
    merge_lora(model)        # an ordinary model again, its zeros where they were

An ordinary LoRA adapter (arXiv:2106.09685) beside a sparse matrix either stays apart for ever or fills its zeros when
it is merged. Under the mask (SPP, arXiv:2405.16057; SparsePEFT of SQFT, arXiv:2410.03750) it can be merged: the
model computes with the merged matrix all along, rounded to the weights' own type, so that what is saved is to the bit
what was trained. The mask is that of the weights that are not zero, and it stays.

torch's own ``parametrize`` puts the sum in the weight's place; no module is replaced, and names of parameters change
only while the adapters are there. Work: R C r more for each matrix and forward, little beside T R C. Memory: the masks,
a byte a weight; the merged matrices between forward and backward, the weights once more, unless gradients
are checkpointed; no gradient and no state of W: 16 r (R + C) bytes of adapters instead of 17 R C.

R = out_features, C = in_features, r = rank. Masks are bool, True = kept.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.errors import UsageError
from secateur.models.branches import carrier
from secateur.models.linears import matrix, stored_transposed


class MaskedLora(nn.Module):
    """What becomes of a weight W, as it is stored: W + mask ⊙ (B A) scale."""

    mask: Tensor

    def __init__(
        self, linear: nn.Module, mask: Tensor, rank: int, scale: float, generator: torch.Generator | None
    ) -> None:
        """A as LoRA begins, uniform within sqrt(1 / C), and B zero. ``mask`` is (R, C)."""
        super().__init__()
        R, C = mask.shape
        self.scale, self.transposed = scale, stored_transposed(linear)
        A = (2 * torch.rand(rank, C, generator=generator) - 1) / math.sqrt(C)
        self.A, self.B = nn.Parameter(A.to(mask.device)), nn.Parameter(torch.zeros(R, rank, device=mask.device))
        self.register_buffer("mask", self._stored(mask).contiguous(), persistent=False)

    def forward(self, W: Tensor) -> Tensor:
        wide = torch.promote_types(W.dtype, torch.float32)
        with torch.autocast(W.device.type, enabled=False):  # what is merged does not depend on who asks
            merged = W.to(wide) + self._stored(self.B @ self.A) * self.scale
        return torch.where(self.mask, merged.to(W.dtype), W)

    def _stored(self, matrix: Tensor) -> Tensor:
        return matrix.T if self.transposed else matrix


@torch.no_grad()
def start_lora(
    model: nn.Module,
    masks: Mapping[str, Bool[Tensor, "R C"]],
    rank: int,
    scale: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[nn.Parameter]:
    """An adapter for every linear in ``masks``, by its full name and (out, in); the parameters that learn, no others.

    Weights that a mask takes away become zero; a weight that is zero already stays so, whatever its mask says.
    UsageError for a rank that a matrix cannot have, and errors as ``models.branches.carrier``.
    """
    linears = {name: carrier(model, name) for name in masks}
    for name, mask in masks.items():
        if not 1 <= rank <= min(mask.shape):
            raise UsageError(
                f"{name} is {tuple(mask.shape)}, an adapter's rank must lie in 1..{min(mask.shape)}, got {rank}"
            )
    model.requires_grad_(False)
    parameters = []
    for name, linear in linears.items():
        W = matrix(linear)
        W.copy_(torch.where(masks[name], W, 0.0))
        adapter = MaskedLora(linear, W != 0, rank, scale, generator)
        parametrize.register_parametrization(linear, "weight", adapter)
        parameters += [adapter.A, adapter.B]
    return parameters


@torch.no_grad()
def merge_lora(model: nn.Module) -> int:
    """Make every adapter a part of its weight; how many there were."""
    found = [
        module
        for module in model.modules()
        if parametrize.is_parametrized(module, "weight")
        and isinstance(module.parametrizations["weight"][0], MaskedLora)  # pyright: ignore
    ]
    for module in found:
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return len(found)
