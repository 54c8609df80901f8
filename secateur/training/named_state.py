"""The whole state of a ``SparseAdamW`` by the names of the parameters: a checkpoint for any number of processes.

    tensors, numbers = gather_state(optimizer, model.named_parameters())        # in all processes
    if shards.is_first():
        save_file(tensors, "state.safetensors")
        Path("state.json").write_text(json.dumps(numbers))
    ...
    deal_state(optimizer, model.named_parameters(), tensors, numbers)           # in all; the first process's count

``tensors`` holds "NAME.master", "NAME.exp_avg", "NAME.exp_avg_sq" (float32) and "NAME.mask" (bool) of every parameter,
whole, and what else is kept of some (the squared inputs that a metric looks at); the master of a float32 parameter
without a pattern is the parameter itself, so trained weights need no second file. ``numbers`` is JSON: the method, the
options of every group, each matrix's decay and flips. Nothing is rounded.

One tensor at a time is whole on the devices; all are in the first process's memory: 13 bytes a weight, 12 without mask.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from secateur.training import shards
from secateur.training.optimizer import SparseAdamW

WRAPPERS = re.compile(r"^module\.|(?<![^.])(_orig_mod|_checkpoint_wrapped_module)\.")
"""What DDP, torch.compile and activation checkpointing put into the names of a model's parameters."""
NUMBERS = ("decay", "flips", "tokens", "penalty")
"""State that is one number a matrix."""
Named = Iterable[tuple[str, Tensor]]


@torch.no_grad()
def gather_state(optimizer: SparseAdamW, named: Named) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, numbers) as above: contiguous copies on the CPU in the first process, no tensors in others. Together.

    ``named`` is ``model.named_parameters()``. Raises ValueError where a parameter of the optimizer is not in it.
    """
    optimizer.begin()
    names = _names(optimizer, named)
    tensors = {}
    for parameter, name in names.items():
        for key, own in _tensors(optimizer, parameter).items():
            whole = shards.whole(own)
            if shards.is_first():
                tensors[f"{name}.{key}"] = whole.to("cpu", copy=True, memory_format=torch.contiguous_format)
    numbers = {
        key: {name: float(optimizer.state[p][key]) for p, name in names.items() if key in optimizer.state[p]}
        for key in NUMBERS
    }
    return tensors, {
        "method": optimizer.method,
        "scope": optimizer.scope,
        "groups": _groups(optimizer, names),
        **numbers,
    }


@torch.no_grad()
def deal_state(optimizer: SparseAdamW, named: Named, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
    """Go on where ``gather_state`` stopped: state, options of the groups and the model's weights. Together.

    Only what the first process passes is looked at. An optimizer that has not begun begins. Raises ValueError, in all
    processes and before any state changes, for the state of another method, other groups, patterns or shapes.
    """
    optimizer.begin()
    names = _names(optimizer, named)
    saved, shapes = shards.told((dict(numbers), {key: tuple(tensor.shape) for key, tensor in tensors.items()}))
    _check_same(_facts(saved["method"], saved["scope"], saved["groups"], shapes), _facts_here(optimizer, names))
    for group, options in zip(optimizer.param_groups, saved["groups"], strict=True):
        kept = {key: value for key, value in options.items() if key != "names"}
        group.update({**kept, "betas": tuple(kept["betas"])})
    for parameter, name in names.items():
        for key, own in _tensors(optimizer, parameter).items():
            shards.local(own).copy_(shards.dealt(tensors.get(f"{name}.{key}"), own))
        for key in NUMBERS:
            if key in optimizer.state[parameter]:
                optimizer.state[parameter][key] = torch.tensor(saved[key][name])
    optimizer.rewrite()


def _names(optimizer: SparseAdamW, named: Named) -> dict[Tensor, str]:
    """The optimizer's parameters in its order, each with its name in a model that nothing wraps."""
    known = {parameter: WRAPPERS.sub("", name) for name, parameter in named}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if nameless := [tuple(parameter.shape) for parameter in parameters if parameter not in known]:
        raise ValueError(
            f"{len(nameless)} parameters have no name, the first of shape {nameless[0]}; pass named_parameters() of "
            "the model that the optimizer trains"
        )
    return {parameter: known[parameter] for parameter in parameters}


def _tensors(optimizer: SparseAdamW, parameter: Tensor) -> dict[str, Tensor]:
    held = {key: value for key, value in optimizer.state[parameter].items() if key not in NUMBERS}
    return {"master": parameter.detach(), **held}


def _groups(optimizer: SparseAdamW, names: dict[Tensor, str]) -> list[dict[str, Any]]:
    """The options of every group as JSON has them, and the names of its parameters."""
    return [
        {
            **{key: value for key, value in group.items() if key != "params"},
            "lr": float(group["lr"]),
            "betas": list(group["betas"]),
            "names": [names[parameter] for parameter in group["params"]],
        }
        for group in optimizer.param_groups
    ]


def _facts_here(optimizer: SparseAdamW, names: dict[Tensor, str]) -> dict[str, Any]:
    shapes = {
        f"{name}.{key}": tuple(own.shape)
        for parameter, name in names.items()
        for key, own in _tensors(optimizer, parameter).items()
    }
    return _facts(optimizer.method, optimizer.scope, _groups(optimizer, names), shapes)


def _facts(method: str, scope: str, groups: list[dict[str, Any]], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What must not change between a checkpoint and going on."""
    places = {
        name: {"group": number, "pattern": group["pattern"], "transposed": group["transposed"]}
        for number, group in enumerate(groups)
        for name in group["names"]
    }
    return {"method": method, "scope": scope, **places, **shapes}


def _check_same(came: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in {**wanted, **came}:
        was, here = came.get(name, "absent"), wanted.get(name, "absent")
        if was != here:
            raise ValueError(f"this state is of another training: {name} was {was} and is {here}")
