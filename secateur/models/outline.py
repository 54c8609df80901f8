"""The roles of a block's linears as far as shapes and order tell them, for a model without weights.

``layout`` observes roles by numbers. Here one pass over shapes tells the order of the linears and who reads whose
tensor; the FFN is then taken to be the last linear and the one or two before it that read one input and give its width
(or, fused, twice its width), and the linear before them the attention's output projection. That holds for the
architectures known today and is verified, in numbers, when pruning begins.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secateur.models.adapter import DecoderAdapter

TOKENS = 8


class Ran(NamedTuple):
    """One linear, when it ran."""

    name: str
    shape: tuple[int, int]
    input: Tensor


@dataclass(frozen=True)
class Outline:
    """Names of a block's linears by their likely role."""

    attention: tuple[tuple[str, ...], ...]
    """Those before the output projection, grouped by shared input; all of the block where no FFN is seen."""
    out: str | None
    first: tuple[str, ...]
    """Gate and up, or up."""
    down: str | None


def outline(adapter: DecoderAdapter, index: int) -> Outline:
    """The likely roles of one block's linears."""
    ran = _watch(adapter, index)
    count = _sources(ran)
    if not count:
        return Outline(_shared(ran), None, (), None)
    before, first = ran[: -1 - count], ran[-1 - count : -1]
    out = before[-1].name if before else None
    return Outline(_shared(before[:-1]), out, tuple(r.name for r in first), ran[-1].name)


def _watch(adapter: DecoderAdapter, index: int) -> list[Ran]:
    ran: list[Ran] = []

    def note(name: str, shape: tuple[int, int], module: nn.Module, args: tuple[Tensor, ...]) -> None:
        ran.append(Ran(name, shape, args[0]))

    tokens = torch.zeros(1, TOKENS, dtype=torch.int64)
    linears = adapter.linears(adapter.blocks[index])
    handles = [
        linear.register_forward_pre_hook(partial(note, name, adapter.shape(linear))) for name, linear in linears.items()
    ]
    try:
        adapter.replay(index, adapter.first_hidden(tokens), adapter.calls(1, TOKENS)[index])
    finally:
        for handle in handles:
            handle.remove()
    return ran


def _sources(ran: list[Ran]) -> int:
    """How many linears before the last one feed it: 0 where they do not look like an FFN."""
    if len(ran) < 2:
        return 0
    *before, down = ran
    width, count = down.shape[1], 0
    for one in reversed(before[-2:]):
        if one.input is not before[-1].input or one.shape[0] not in (width, 2 * width):
            break
        count += 1
    return 1 if count and before[-1].shape[0] == 2 * width else count


def _shared(ran: list[Ran]) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for one in ran:
        groups.setdefault(id(one.input), []).append(one.name)
    return tuple(tuple(names) for names in groups.values())
