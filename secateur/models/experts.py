"""The experts of a sparse block (mixture of experts), seen as ordinary linears.

A router chooses a few experts for every token; an expert is a small feed-forward network that sees the tokens routed to
it and no others. transformers 5 keeps all experts of a block in one module of fused parameters, ``gate_up_proj``
(E, 2K, D) and ``down_proj`` (E, D, K), and multiplies them in grouped kernels that no hook can look into; other models
hold a list of small modules. Here both are the same thing: ``Experts``, whose linears carry names such as
``mlp.experts.3.gate_proj``. A fused matrix is an ``ExpertLinear``, a view that reads and writes the parameter in place:
no memory of its own, nothing registered in the model. The halves of ``gate_up_proj`` are two linears, because that is
how checkpoints store them, and each has an exact pattern of its own.

The model's own forward stays what it is, grouped kernels and all. Only while somebody watches, ``unfused`` replaces the
fused module's forward with the plain loop over experts, so that hooks on expert linears fire. That the loop computes
what the module computes is checked on every block by ``expert_layout``.

Two kinds of matrices decide instead of work, and are never pruned: the router, one output per expert, and the gate of a
shared expert, one output in all. They are recognised by that, among everything that lies beside the experts.

E = experts, T = tokens, D = hidden size, K = inner size of an expert.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.activations import Elementwise
from secateur.errors import ModelError
from secateur.models.hooks import replaced_forward
from secateur.models.linears import PlainLinear


class Fused(NamedTuple):
    """Names of the parameters of one form of fused experts."""

    first: str
    """(E, parts x K, D)."""
    parts: tuple[str, ...]
    """What its rows are, in order, by the names that single experts give them."""
    down: str
    """(E, D, K)."""


FUSED = (Fused("gate_up_proj", ("gate_proj", "up_proj"), "down_proj"), Fused("up_proj", ("up_proj",), "down_proj"))
"""How experts are stored in one module. Another order of axes, interleaved halves and biases are not among them yet."""


class ExpertLinear(nn.Module):
    """Rows ``start`` to ``stop`` of one expert's matrix inside a fused parameter, with the face of an nn.Linear."""

    bias = None

    def __init__(self, owner: nn.Module, parameter: str, expert: int, start: int, stop: int) -> None:
        super().__init__()
        self._owner = (owner,)  # a tuple, so that the owner does not become a submodule of its own view
        self.parameter, self.expert, self.start, self.stop = parameter, expert, start, stop

    @property
    def holder(self) -> nn.Parameter:
        """The fused parameter."""
        return self._owner[0].get_parameter(self.parameter)

    @property
    def weight(self) -> Float[Tensor, "R C"]:
        """A view: looked up each time, since moving a block to a device replaces what lies behind its parameters."""
        return self.holder[self.expert, self.start : self.stop]

    def forward(self, X: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch R"]:
        return F.linear(X, self.weight)


Linear = PlainLinear | ExpertLinear
"""Whatever holds a prunable matrix."""


class Routing(NamedTuple):
    """What a fused module is called with."""

    hidden: Float[Tensor, "T D"]
    index: Int[Tensor, "T k"]
    """The experts of each token."""
    weight: Float[Tensor, "T k"]
    """What their outputs are multiplied with."""


@dataclass(frozen=True, eq=False)
class Experts:
    """All experts of one sparse block."""

    name: str
    """Inside the block: "mlp.experts"."""
    module: nn.Module
    """The fused module, or the list."""
    entrance: nn.Module
    """A module whose first argument are the hidden states of all tokens: the fused module, or the router."""
    linears: tuple[dict[str, Linear], ...]
    """Of each expert, by their name inside the block."""
    fused: bool
    left_alone: tuple[str, ...]
    """Names of the parameters of the router and of gates beside the experts."""

    def run(self, expert: int, X: Float[Tensor, "T D"], phi: Elementwise | None) -> Float[Tensor, "T D"]:
        """One expert's output for any tokens; phi is what ``expert_layout`` found, and of no use to a list."""
        if phi is None:
            assert isinstance(self.module, nn.ModuleList)
            return self.module[expert](X)
        *first, down = self.linears[expert].values()
        outputs = [linear(X) for linear in first]
        return down(phi(outputs[0]) if len(outputs) == 1 else phi(outputs[0]) * outputs[1])

    def loop(self, phi: Elementwise, *args: Any, **kwargs: Any) -> Float[Tensor, "T D"]:
        """The fused module's forward, expert by expert."""
        hidden, index, weight = routing(self.name, args, kwargs)
        out = torch.zeros_like(hidden)
        for expert in range(len(self.linears)):
            token, place = torch.where(index == expert)
            if len(token):
                said = self.run(expert, hidden[token], phi) * weight[token, place, None]
                out.index_add_(0, token, said.to(out.dtype))
        return out


def routing(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Routing:
    """Who goes where, recognised by dtype and shape among the arguments of a fused module."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    indices = [t for t in tensors if not t.is_floating_point() and t.ndim == 2]
    if len(indices) == 1:
        weights = [t for t in tensors if t.is_floating_point() and t.shape == indices[0].shape]
        hidden = [t for t in tensors if t.is_floating_point() and t.ndim == 2 and len(t) == len(indices[0])]
        if weights and hidden and hidden[0] is not weights[-1]:
            return Routing(hidden[0], indices[0], weights[-1])
    shapes = ", ".join(f"{t.dtype} {tuple(t.shape)}".removeprefix("torch.") for t in tensors) or "no tensor"
    raise ModelError(
        f"{name} is called with {shapes}; hidden states (tokens, width), indices and weights (tokens, k) were wanted; "
        "this kind of experts is not supported yet"
    )


def unfused(experts: Sequence[tuple[Experts, Elementwise | None]]) -> AbstractContextManager[None]:
    """Fused experts run as plain loops in here; lists run expert by expert anyway."""
    return replaced_forward({one.module: partial(one.loop, phi) for one, phi in experts if phi is not None})


# ------------------------------------------------------------------------------------------------------------- finding


def find_experts(block: nn.Module) -> tuple[Experts, ...]:
    """The experts of a block; none in an ordinary one. ModelError where nothing beside them looks like a router."""
    found = []
    for name, module in block.named_modules():
        linears = _fused_linears(name, module) or _listed_linears(name, module)
        if not linears:
            continue
        beside, routers = _beside(block, name, len(linears))
        fused = not isinstance(module, nn.ModuleList)
        if not routers and not fused:
            continue  # an ordinary list of modules
        if not routers:
            raise ModelError(
                f"{name} holds {len(linears)} experts, but no matrix beside it has one output for each: the router is "
                "not known and could be pruned by mistake; this architecture is not supported yet"
            )
        entrance = module if fused else block.get_submodule(routers[0].rpartition(".")[0])
        found.append(Experts(name, module, entrance, linears, fused, beside))
    return tuple(found)


def _fused_linears(name: str, module: nn.Module) -> tuple[dict[str, Linear], ...]:
    """Views of every expert of a fused module; none of any other."""
    row = fused_row(module)
    if row is None:
        return ()
    E, D, K = module.get_parameter(row.down).shape
    return tuple(_views(name, module, row, e, D, K) for e in range(E))


def fused_row(module: nn.Module) -> Fused | None:
    """The row of FUSED whose parameters, and no others, a module holds."""
    own = dict(module.named_parameters(recurse=False))
    for row in FUSED:
        if own.keys() == {row.first, row.down} and all(p.ndim == 3 for p in own.values()):
            E, D, K = own[row.down].shape
            if own[row.first].shape == (E, len(row.parts) * K, D):
                return row
    return None


def _views(name: str, module: nn.Module, row: Fused, expert: int, D: int, K: int) -> dict[str, Linear]:
    views: dict[str, Linear] = {
        f"{name}.{expert}.{part}": ExpertLinear(module, row.first, expert, i * K, (i + 1) * K)
        for i, part in enumerate(row.parts)
    }
    return views | {f"{name}.{expert}.{row.down}": ExpertLinear(module, row.down, expert, 0, D)}


def _listed_linears(name: str, module: nn.Module) -> tuple[dict[str, Linear], ...]:
    """The linears of every member of a list of at least two modules of one class."""
    if not isinstance(module, nn.ModuleList) or len(module) < 2 or len({type(member) for member in module}) > 1:
        return ()
    members: tuple[dict[str, Linear], ...] = tuple(
        {f"{name}.{e}.{n}": m for n, m in member.named_modules() if n and isinstance(m, PlainLinear)}
        for e, member in enumerate(module)
    )
    return members if all(members) else ()


def _beside(block: nn.Module, name: str, experts: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Parameters beside the experts with one output per expert, or one in all; the first kind again alone."""
    parent = name.rpartition(".")[0]
    within = f"{parent}." if parent else ""
    outputs = {
        within + n: p.shape[0]
        for n, p in block.get_submodule(parent).named_parameters()
        if p.ndim == 2 and not (within + n).startswith(f"{name}.")
    }
    beside = tuple(n for n, rows in outputs.items() if rows in (1, experts))
    return beside, tuple(n for n in beside if outputs[n] == experts)


def expert_linears(experts: Sequence[Experts]) -> dict[str, Linear]:
    """The linears that see only the tokens routed to them, by their name inside the block."""
    return {name: linear for one in experts for linears in one.linears for name, linear in linears.items()}


def with_experts(found: dict[str, Linear], experts: Sequence[Experts]) -> dict[str, Linear]:
    """The linears found in a block, without those that are left alone, with those of fused experts."""
    alone = {name for one in experts for name in one.left_alone}
    return {n: linear for n, linear in found.items() if f"{n}.weight" not in alone} | expert_linears(experts)


def known_parameters(experts: Sequence[Experts]) -> set[str]:
    """Names of the parameters whose parts appear as linears, and of those that are left alone."""
    fused = {f"{one.name}.{n}" for one in experts if one.fused for n, _ in one.module.named_parameters(recurse=False)}
    return fused | {name for one in experts for name in one.left_alone}
