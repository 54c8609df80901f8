"""What ``SparseAdamW`` keeps of one parameter: tensors by name, each shared between processes as the parameter is.

exp_avg, exp_avg_sq               moments, float32, always
master                            float32, where there is a pattern or the parameter is of another type
mask, decay, flips                where there is a pattern and the method prunes
inputs, tokens                    sums of squared inputs, where the metric looks at them
split, penalty                    ADMM's W + U and lambda of its last refresh, where the method is that
fisher                            average of squared gradients, where the metric is that and exp_avg_sq is not
scale, scale_avg, scale_avg_sq    row scales and their moments, (R, n), where there are any
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.core.row_scales import group_sums, spread
from secateur.core.sparse_adamw import Decay, Step, Weights, adamw_, dual_
from secateur.training import shards
from secateur.training.shards import local

State = dict[str, Any]


def begin(
    parameter: Tensor, group: Mapping[str, Any], *, inputs: bool, scales: int, split: bool, fisher: bool
) -> State:
    """The state of a parameter before its first step, but for its mask. ``group`` is the optimizer's."""
    state: State = {name: torch.zeros_like(parameter, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
    sparse, transposed = group["pattern"] is not None, group["transposed"]
    if sparse or parameter.dtype != torch.float32:
        state["master"] = parameter.detach().float().clone()
    if sparse and inputs:
        C = parameter.shape[0 if transposed else 1]
        shape = (C, 1) if transposed else (C,)
        state["inputs"] = torch.zeros(shape, dtype=torch.float32, device=local(parameter).device)
        state["tokens"] = torch.zeros(())
    if sparse and split:
        state["split"] = state["master"].clone()
        state["penalty"] = torch.zeros(())
    if sparse and fisher:
        state["fisher"] = torch.zeros_like(parameter, dtype=torch.float32)
    if sparse and scales:
        few = parameter.detach()[:scales] if transposed else parameter.detach()[..., :scales]  # placed as it is
        state["scale"] = torch.ones_like(few, dtype=torch.float32)
        state |= {name: torch.zeros_like(few, dtype=torch.float32) for name in ("scale_avg", "scale_avg_sq")}
    return state


def held(parameter: Tensor, state: State) -> Weights:
    """The rows that this process holds."""
    parts = {key: local(value) for key, value in state.items()}
    master = parts["master"] if "master" in parts else local(parameter.detach())
    inputs = parts["inputs"] / parts["tokens"] if parts.get("tokens") else None
    more = {key: parts.get(key) for key in ("scale", "split", "fisher")}
    penalty = float(parts.get("penalty", 0.0))
    return Weights(master, parts["exp_avg"], parts["exp_avg_sq"], parts.get("mask"), inputs, **more, penalty=penalty)


def judged(parameter: Tensor, state: State) -> Weights:
    """The same as a metric is to see it: ADMM chooses among the weights of W + U."""
    own = held(parameter, state)
    return own if own.split is None else own._replace(W=own.split)


def measure(parameter: Tensor, state: State, decay: Decay, method: str) -> None:
    """What lambda is to be. Together."""
    pull = decay.of(held(parameter, state), method, partial(shards.norm, parameter=parameter))
    state["decay"] = torch.tensor(pull)


def dual(parameter: Tensor, state: State, annealed: float) -> None:
    """ADMM's dual step, before a new mask."""
    own = held(parameter, state)
    penalty = float(state["decay"]) * annealed or own.penalty  # never back to nothing
    dual_(own, penalty)
    state["penalty"] = torch.tensor(penalty)


def move_scales(state: State, G: Tensor, used: Tensor, step: Step) -> Tensor:
    """AdamW of the scales; the gradient at the master. G is that at the model's weights, A times ``used``."""
    A, m, v = (local(state[name]) for name in ("scale", "scale_avg", "scale_avg_sq"))
    at_master, at_scales = G * spread(A, G.shape), group_sums(G * used, A)
    adamw_(Weights(A, m, v), at_scales, step)
    return at_master
