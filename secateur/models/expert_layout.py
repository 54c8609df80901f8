"""What the experts of a block compute, found out by running them: the part of ``layout`` that routing makes different.

An expert may see no token of a short probe, so its linears cannot be watched in a replay. Instead every expert is run
on all tokens of the probe, and its linears are watched then: their order, which of them share an input, and the form of
the feed-forward network that they are. For fused experts that first needs the activation: of all in
``core.activations``, the one with which the plain loop over experts gives what the module itself gives (whatever kernel
that uses). If none does, the block is refused, for every method: what the experts are is then not known.

T = tokens, D = hidden size.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.core.activations import ACTIVATIONS, Elementwise
from secateur.errors import ModelError
from secateur.models.adapter import Call, DecoderAdapter
from secateur.models.experts import Experts, unfused
from secateur.models.layout import TOLERANCE, FeedForwardForm, feed_forward, groups_of, noted, relative


@dataclass(frozen=True)
class Member:
    """One expert."""

    name: str
    """Inside the block: "mlp.experts.3"."""
    groups: tuple[tuple[str, ...], ...]
    """Its linears by shared input, in the order in which they run."""
    ffn: FeedForwardForm | None
    refusal: str | None
    """Why there is no ``ffn``, in one line."""


@dataclass(frozen=True)
class ExpertLayout:
    """The experts of one sparse block, with what was observed of them."""

    experts: Experts
    phi: Elementwise | None
    """The activation of fused experts; a list knows its own."""
    members: tuple[Member, ...]

    def run(self, member: int, X: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        """One expert's output for any tokens, by its linears."""
        return self.experts.run(member, X, self.phi)


class Entered(NamedTuple):
    """One call of the entrance."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def watchable(layouts: tuple[ExpertLayout, ...]) -> AbstractContextManager[None]:
    """Hooks on expert linears fire in here."""
    return unfused([(layout.experts, layout.phi) for layout in layouts])


def observe_experts(
    adapter: DecoderAdapter, index: int, hidden: Float[Tensor, "B S D"], call: Call
) -> tuple[ExpertLayout, ...]:
    """The experts of block `index`, from one replay on `hidden` and one run of each expert."""
    block, name = adapter.blocks[index], adapter.block_names[index]
    return tuple(
        _observed(f"{name}.{experts.name}", experts, _entered(adapter, index, experts, hidden, call))
        for experts in adapter.experts(block)
    )


def _entered(adapter: DecoderAdapter, index: int, experts: Experts, hidden: Tensor, call: Call) -> Entered:
    seen: list[Entered] = []
    with experts.entrance.register_forward_hook(
        lambda _, args, kwargs, output: seen.append(Entered(args, kwargs, output)), with_kwargs=True
    ):
        adapter.replay(index, hidden, call)
    if len(seen) == 1 and seen[0].args:
        return seen[0]
    what = "without a positional argument" if len(seen) == 1 else f"{len(seen)} times"
    raise ModelError(
        f"{adapter.block_names[index]}.{experts.name} is entered {what} in one pass through its block, wanted once "
        "with the hidden states as its first argument; this architecture is not supported yet"
    )


@torch.no_grad()
def _observed(name: str, experts: Experts, entered: Entered) -> ExpertLayout:
    phi = _activation(name, experts, entered) if experts.fused else None
    X = entered.args[0].flatten(0, -2)
    members = tuple(_member(experts, e, X, phi) for e in range(len(experts.linears)))
    return ExpertLayout(experts, phi, members)


def _activation(name: str, experts: Experts, entered: Entered) -> Elementwise:
    """The phi with which the loop reproduces the module, or ModelError with the nearest."""
    errors = {
        phi: relative(experts.loop(row.f, *entered.args, **entered.kwargs), entered.output)
        for phi, row in ACTIVATIONS.items()
    }
    best = min(errors, key=lambda phi: errors[phi])
    if errors[best] <= TOLERANCE[entered.output.dtype]:
        return ACTIVATIONS[best].f
    raise ModelError(
        f"{name}: down(phi(gate) * up), expert by expert, does not give the module's output for any phi of "
        f"{', '.join(ACTIVATIONS)} (nearest {best}, relative error {errors[best]:.1e}); they are not supported yet"
    )


def _member(experts: Experts, expert: int, X: Float[Tensor, "T D"], phi: Elementwise | None) -> Member:
    with noted(experts.linears[expert]) as runs:
        experts.run(expert, X, phi)
    name = f"{experts.name}.{expert}"
    if sorted(run.linear for run in runs) != sorted(experts.linears[expert]):
        ran = ", ".join(run.linear for run in runs) or "none"
        raise ModelError(f"{name}: each of its linears must run once, these ran: {ran}; this is not supported yet")
    ffn, refusal = feed_forward(runs)
    return Member(name, tuple(group.linears for group in groups_of(runs, "ffn")), ffn, refusal)
