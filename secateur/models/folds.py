"""Where a block lets difficulty be moved: what feeds a group of linears and can be divided, channel by channel.

Two kinds of places, both found by running the block. A norm whose output is the very tensor that a group of linears
reads (q, k, v; gate, up): its weight and bias are divided. And of a gated feed-forward network the up projection, whose
output enters the input of down as a factor. Whether anything else reads what was divided, or the norm uses its weight
in another way than as a factor (Gemma's 1 + w), shows in what the block adds to its input: a fold that moves it is
undone. It is asked token by token, since one token's huge activations would hide what happens to all others.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.models.grids import DIVISOR, divide
from secateur.models.hooks import hooked
from secateur.models.layout import Layout

EXACT, UNDERFLOW = 1e-6, {torch.float16: 2e-2}
"""Largest change of what a block adds, as a share of it: powers of two change no digit, but in float16 below 6e-5."""


class Fold(NamedTuple):
    """A module whose output can be divided, and the linears that read it, by their names in the block."""

    source: str
    linears: tuple[str, ...]


def find_folds(block: nn.Module, layout: Layout, replay: Callable[[], Tensor]) -> list[Fold]:
    """All of a block, in the order in which they run. ``replay`` runs the block once."""
    norms = {name: module for name, module in block.named_modules() if is_norm(module)}
    given: dict[str, Tensor] = {}
    read: dict[str, Tensor] = {}
    with _seen(norms, given, output=True), _seen(_readers(block, layout), read, output=False):
        replay()
    found = [
        Fold(name, group.linears)
        for group in layout.groups
        for name, tensor in given.items()
        if read.get(group.linears[0]) is tensor
    ]
    form = layout.ffn
    if form and form.gate and form.gate.linear != form.up.linear:
        found.append(Fold(form.up.linear, (form.down,)))
    return found


def apply_fold(
    block: nn.Module, fold: Fold, s: Float[Tensor, " C"], hidden: Float[Tensor, "B S D"], replay: Callable[[], Tensor]
) -> bool:
    """Divide the source by s, multiply the linears' columns; False, and all is as before, where the block notices.

    ``replay`` gives the block's output for ``hidden``.
    """
    before, kept = replay(), _parameters(block, fold)
    _scale(block, fold, s)
    moved = (replay().float() - before.float()).norm(dim=-1)
    added = (before.float() - hidden.float()).norm(dim=-1).clamp(min=1e-30)
    if not float((moved / added).max()) <= UNDERFLOW.get(before.dtype, EXACT):
        for parameter, values in kept.items():
            parameter.detach().copy_(values)
        return False
    block.get_submodule(fold.source).register_buffer(DIVISOR, s.detach().float().clone(), persistent=False)
    return True


def is_norm(module: nn.Module) -> bool:
    """Something whose parameters all have one axis: it works channel by channel."""
    parameters = list(module.parameters(recurse=False))
    return bool(parameters) and not list(module.children()) and all(p.ndim == 1 for p in parameters)


def _parameters(block: nn.Module, fold: Fold) -> dict[nn.Parameter, Tensor]:
    """What a fold changes, and copies of it."""
    changed = [*block.get_submodule(fold.source).parameters(recurse=False)]
    changed += [block.get_submodule(name).get_parameter("weight") for name in fold.linears]
    return {parameter: parameter.detach().clone() for parameter in changed}


@torch.no_grad()
def _scale(block: nn.Module, fold: Fold, s: Float[Tensor, " C"]) -> None:
    divide(block.get_submodule(fold.source), s)
    for name in fold.linears:
        weight = block.get_submodule(name).get_parameter("weight")
        weight.detach().mul_(s.to(weight.device, weight.dtype))


def _readers(block: nn.Module, layout: Layout) -> dict[str, nn.Module]:
    return {group.linears[0]: block.get_submodule(group.linears[0]) for group in layout.groups}


def _seen(modules: dict[str, nn.Module], into: dict[str, Tensor], *, output: bool) -> AbstractContextManager[None]:
    """Note what each module is given, or what it gives."""

    def see(name: str, _: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        into[name] = result if output else args[0]

    return hooked(module.register_forward_hook(partial(see, name)) for name, module in modules.items())
