"""SLoRB (AST, arXiv:2407.20584): trainable branches that hold the group means of what a mask takes away.

    new = start_slorb(model, masks, k=16, masters=masters)
    optimizer.add_param_group({"params": new, "pattern": None})
    follow_masks(optimizer, model)                                  # as one likes; published is without

y = x (mask * W)ᵀ + (x Xᵀ) Sᵀ: the branch adds what the optimizer does not prune, and lies apart from it when the model
is saved (``models.branches``).
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from secateur.core.linalg import fit_change
from secateur.core.low_rank import Branch, group_mean
from secateur.errors import UsageError
from secateur.models.branches import attach, attached, carrier
from secateur.models.linears import matrix, turned
from secateur.training import shards
from secateur.training.held import State, held
from secateur.training.optimizer import SparseAdamW
from secateur.training.shards import local


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


def follow_masks(optimizer: SparseAdamW, model: nn.Module) -> None:
    """From now on what a refresh of the masks takes away enters the branches beside them, and what comes back leaves.

    S changes by Δ Xᵀ (X Xᵀ)⁻¹ with Δ = W where it was kept and is pruned now, -W the other way round: least squares on
    the branch's X, for the X of the start the group means of Δ. ``optimizer`` has begun. Where processes share matrices
    these are (out, in).
    """
    followed = [(model.get_submodule(name), branch) for name, branch in attached(model).items()]
    before: list[Tensor] = []

    def remember(*_: Any) -> None:
        due = optimizer.schedule.refreshes(optimizer.param_groups[0]["step"] + 1)
        before.extend(
            local(optimizer.state[linear.get_parameter("weight")]["mask"]).clone() for linear, _ in followed if due
        )

    def follow(*_: Any) -> None:
        for (linear, branch), mask in zip(followed, before, strict=False):  # no masks, no refresh
            _follow(optimizer.state, linear, branch, mask)
        before.clear()

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(follow)


@torch.no_grad()
def _follow(states: Mapping[Tensor, State], linear: nn.Module, branch: Branch, before: Bool[Tensor, "..."]) -> None:
    weight = linear.get_parameter("weight")
    gone = held(weight, states[weight]).W * (before.float() - local(states[weight]["mask"]).float())
    X, S = shards.whole(branch.X).float(), held(branch.S, states[branch.S]).W
    S.add_(fit_change(turned(linear, gone) @ X.T, X @ X.T, damp=1e-6))
    local(branch.S).copy_(S)


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
