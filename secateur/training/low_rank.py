"""SLoRB's start (AST, arXiv:2407.20584): trainable branches that hold the group means of what a mask takes away.

    new = start_slorb(model, masks, k=16, masters=masters)
    optimizer.add_param_group({"params": new, "pattern": None})

y = x (mask * W)ᵀ + (x Xᵀ) Sᵀ: the branch adds what the optimizer does not prune, and lies apart from it when the model
is saved (``models.branches``).
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from secateur.core.low_rank import Branch, group_mean
from secateur.errors import UsageError
from secateur.models.branches import attach, carrier, matrix


@torch.no_grad()
def start_slorb(
    model: nn.Module,
    masks: Mapping[str, Bool[Tensor, "R C"]],
    k: int,
    *,
    masters: Mapping[str, Float[Tensor, "R C"]] | None = None,
    train_X: bool = True,
) -> list[nn.Parameter]:
    """Attach a branch of rank in_features / k to every linear in ``masks``; the new parameters, for an optimizer.

    ``masks`` (True = kept) and ``masters`` (the dense weights; the model's own where these are still dense) go by the
    linear's full name and are (out, in), whatever the module. Without ``train_X`` X stays the sum over k inputs that it
    begins as, and only S is trained and returned.

    Where all that a mask takes away is zero already, in a model that was pruned before, S begins at zero: a model that
    made up for its zeros is left as it is. UsageError where k does not divide the inputs or a mask does not fit, and
    as in ``attach``.
    """
    branches = {}
    for name, mask in masks.items():
        W = masters.get(name) if masters is not None else matrix(carrier(model, name))
        branches[name] = _started(name, W, mask, k)
    factors = attach(model, branches)  # S and X in turn
    parameters = factors if train_X else factors[::2]
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def _started(name: str, W: Tensor | None, mask: Tensor, k: int) -> Branch:
    if W is None or W.shape != mask.shape:
        found = "none" if W is None else tuple(W.shape)
        raise UsageError(
            f"{name}: dense weights of {tuple(mask.shape)} (out, in) are wanted with its mask, got {found}"
        )
    try:
        return group_mean(W.float(), mask, k)
    except ValueError as error:  # a k that does not divide the inputs
        raise UsageError(f"{name}: {error}") from error
