"""The roles of a block's linears as far as shapes and order tell them, for a model without weights.

``layout`` observes roles by numbers. Here one pass over shapes tells the order of the linears and who reads whose
tensor; the FFN is then taken to be the last linear and the one or two before it that read one input and give its width
(or, fused, twice its width), and the linear before them the attention's output projection. In a block with experts the
linears beside these are the FFN, a shared expert, and all others the attention. That holds for the architectures known
today and is verified, in numbers, when pruning begins.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ModelError
from secateur.models.adapter import DecoderAdapter
from secateur.models.experts import Experts, routing
from secateur.models.hooks import hooked
from secateur.models.layout import Ran, noted, unrouted

TOKENS = 8


@dataclass(frozen=True)
class Mixture:
    """Experts of a block."""

    members: tuple[tuple[tuple[str, ...], str], ...]
    """(Gate and up, or up; down) of each."""
    share: float
    """Of all tokens, what one expert sees if the router spreads them evenly."""


@dataclass(frozen=True)
class Outline:
    """Names of a block's linears by their likely role."""

    attention: tuple[tuple[str, ...], ...]
    """Those before the output projection, grouped by shared input; all of the block where no FFN is seen."""
    out: str | None
    first: tuple[str, ...]
    """Gate and up, or up; of what sees every token."""
    down: str | None
    experts: tuple[Mixture, ...] = ()


def outline(adapter: DecoderAdapter, index: int) -> Outline:
    """The likely roles of one block's linears."""
    experts = adapter.experts(adapter.blocks[index])
    for one in experts:
        if not one.fused:
            raise ModelError(f"{one.name}: experts in a list of modules cannot be planned; prune can prune them")
    ran, routed = _watch(adapter, index, experts)
    mixtures = tuple(map(_mixture, experts, routed))
    beside = tuple(f"{one.name.rpartition('.')[0]}." for one in experts)
    ffn = [r for r in ran if not experts or r.linear.startswith(beside)]
    attention = [r for r in ran if experts and not r.linear.startswith(beside)]
    count = _sources(ffn)
    if not count and not experts:
        return Outline(_shared(ran), None, (), None)
    before = attention + ffn[: -1 - count] if count else attention
    first, down = (ffn[-1 - count : -1], ffn[-1].linear) if count else ([], None)
    out = before[-1].linear if before else None
    return Outline(_shared(before[:-1]), out, tuple(r.linear for r in first), down, mixtures)


def _mixture(experts: Experts, routed: int) -> Mixture:
    members = tuple((tuple(linears)[:-1], tuple(linears)[-1]) for linears in experts.linears)
    return Mixture(members, routed / TOKENS / len(members))


def _watch(adapter: DecoderAdapter, index: int, experts: Sequence[Experts]) -> tuple[list[Ran], list[int]]:
    """The linears that every token runs through, in order; how many tokens, summed over experts, each mixture got."""
    routed = [0 for _ in experts]

    def sent(place: int, name: str, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        routed[place] += routing(name, args, kwargs).index.numel()

    tokens = torch.zeros(1, TOKENS, dtype=torch.int64)
    entered = (
        one.module.register_forward_pre_hook(partial(sent, place, one.name), with_kwargs=True)
        for place, one in enumerate(experts)
    )
    with noted(unrouted(adapter, index)) as ran, hooked(entered):
        adapter.replay(index, adapter.first_hidden(tokens), adapter.calls(1, TOKENS)[index])
    return ran, routed


def _sources(ran: list[Ran]) -> int:
    """How many linears before the last one feed it: 0 where they do not look like an FFN."""
    if len(ran) < 2:
        return 0
    *before, down = ran
    width, count = down.input.shape[-1], 0
    for one in reversed(before[-2:]):
        if one.input is not before[-1].input or one.output.shape[-1] not in (width, 2 * width):
            break
        count += 1
    return 1 if count and before[-1].output.shape[-1] == 2 * width else count


def _shared(ran: list[Ran]) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for one in ran:
        groups.setdefault(id(one.input), []).append(one.linear)
    return tuple(tuple(names) for names in groups.values())
