"""Weights with two axes that are no matrices: norms with a row per attention head, told from matrices by trying.

Command R+ normalises queries and keys with a weight of shape (heads, head_dim). Such a weight multiplies its input
element by element, so changing one of its entries changes that one place of the module's output and no other; an entry
of a matrix reaches every row of what is multiplied. A module is asked this of each of its weights, on the input that it
gets in one replay of its block.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.models.hooks import hooked


def elementwise(block: nn.Module, names: Iterable[str], replay: Callable[[], Any]) -> set[str]:
    """Those of the named parameters of a block that scale element by element; `replay` runs the block once."""
    inputs: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            inputs[module] = args[0]

    places = [(name, block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    with hooked(owner.register_forward_hook(note) for owner in {owner for _, owner, _ in places}):
        replay()
    return {name for name, owner, last in places if owner in inputs and _is_elementwise(owner, last, inputs[owner])}


@torch.no_grad()
def _is_elementwise(owner: nn.Module, name: str, X: Tensor) -> bool:
    """The weight's first entry moves its own place of the output, for every token, and no other place."""
    weight, before = owner.get_parameter(name), owner(X)
    if before.shape[-weight.ndim :] != weight.shape:
        return False
    changed = weight.clone()
    changed.flatten()[0] += 1
    moved = (functional_call(owner, {name: changed}, (X,)) != before).reshape(-1, weight.numel()).any(dim=0)
    return bool(moved[0]) and not moved[1:].any()
