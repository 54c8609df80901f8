"""What a pruned block's outputs lack, given back in part by low-rank branches; nothing is trained.

Once a block is pruned by whatever method, the dense block runs beside it, and every pruned linear gets the best branch
of its rank for what its output lacks, on the inputs that it really receives:

    e = X_dense W0ᵀ - X Wᵀ                      of a linear: what the dense block's own one says for the same token
    e = the dense block's output - the block's  of its last linear, where that is added to the residual stream as it is
    S, X = argmin E|e - S X x|² + ridge |S X|²  (``core.low_rank.residual_fit``)

For a block's first linears, whose inputs are the dense ones, e = x (W0 - W)ᵀ and this is EoRA (arXiv:2410.21271).
Behind them it is more: errors of earlier linears are in it, and W0 - W is not what is lost where a method has fitted W
to make up for these. EoRA's branches everywhere make the blocks of closed mode worse (docs/low_rank.md has numbers).

A branch changes the inputs of what runs after it. So there is a pass over the calibration for every distinct input, in
the order in which they run, with all earlier branches in place: four in a Llama block. Moments that a method has would
do for none but the first.

Memory: the block a second time. Time: for each pass two forwards of the block, a Gram matrix and cross moments, and for
each linear a factorisation and the singular values of R x C.

R = out_features, C = in_features.
"""

import copy
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.core.low_rank import Branch, residual_fit
from secateur.core.moments import CrossMoments, Gram, Totals
from secateur.core.plan import Plan
from secateur.errors import UsageError
from secateur.models.adapter import DecoderAdapter
from secateur.models.branches import attach
from secateur.models.experts import expert_linears
from secateur.models.linears import matrix
from secateur.pruning.layerwise import planned_groups
from secateur.pruning.records import BranchRecord
from secateur.pruning.work import Work, products


def dense_copy(work: Work) -> nn.Module:
    """The block as it is before it is pruned."""
    return copy.deepcopy(work.block)


def compensate(work: Work, dense: nn.Module, rank: int) -> None:
    """Attach a branch to every pruned linear of the block, and put down in its record what that is good for."""
    for linears in planned_groups(work):
        H, lacks = _moments(work, dense, linears)
        for name, (residual, energy) in lacks.items():
            _give_back(work, name, residual.mean(), H.mean(), float(energy.sum) / max(energy.tokens, 1), rank)


def _moments(
    work: Work, dense: nn.Module, linears: tuple[str, ...]
) -> tuple[Gram, dict[str, tuple[CrossMoments, Totals]]]:
    """Moments of the input that these linears share: by itself, and with what the output of each lacks; |lacking|²."""
    device = torch.device(work.options.device)
    gram = Gram.zeros(work.targets[linears[0]].shape[1], device)
    lacks = {name: (CrossMoments.zeros(*work.targets[name].shape, device), Totals.zeros(1, device)) for name in linears}
    with work.forwards("low rank"):
        for X, lacking in _lacking(work, dense, linears):
            gram.update(X)
            for name, (residual, energy) in lacks.items():
                residual.update(lacking[name], X)
                energy.sum += lacking[name].double().square().sum()
                energy.tokens += len(X)
        for moments in (gram, *(one for pair in lacks.values() for one in pair)):
            work.combine(moments)
    return gram, lacks


def _lacking(
    work: Work, dense: nn.Module, linears: tuple[str, ...]
) -> Iterator[tuple[Float[Tensor, "T C"], dict[str, Float[Tensor, "T R"]]]]:
    """Chunk by chunk, of rows that are finite in both blocks: the shared input, and what each output lacks."""
    here, there = work.linear(linears[0]), dense.get_submodule(linears[0])
    weights = {
        name: (matrix(dense.get_submodule(name)).float(), work.adapter.read(work.linear(name)))
        for name in linears
        if name != last_of(work)
    }
    for rows in work.hidden:
        output, seen = work.watched(rows, [here])
        wanted, seen_dense = work.watched(rows, [there], dense)
        finite = torch.isfinite(output - wanted).flatten(1).all(dim=1).to(work.options.device)

        def tokens(values: Tensor, rows: Tensor = rows, finite: Tensor = finite) -> Tensor:
            """Some models flatten rows and tokens before a linear."""
            kept = values.to(finite.device).reshape(len(rows), -1, values.shape[-1])[finite]
            return kept.flatten(0, 1).float()

        X, X_dense = tokens(seen[here]), tokens(seen_dense[there])
        lacking = {name: X_dense @ W0.T - X @ W.T for name, (W0, W) in weights.items()}
        yield X, {name: lacking[name] if name in lacking else tokens(wanted - output) for name in linears}


def last_of(work: Work) -> str | None:
    """The linear whose output enters the residual stream last and as it is; None where a norm or a factor follows."""
    return work.layout.groups[-1].linears[-1] if work.layout.additive else None


def _give_back(
    work: Work, name: str, residual: Float[Tensor, "R C"], H: Float[Tensor, "C C"], lacking: float, rank: int
) -> None:
    """One linear's branch. Of several processes all take the first's, and with it the same bits."""
    same = work.options.ranks.same
    with products("float32"), work.stage("solve"):
        S, X = residual_fit(residual, H, rank)
        stored = attach(work.block, {name: Branch(same(S), same(X))})
        P = stored[0].float() @ stored[1].float()
        returned = float((P * (2 * residual - P @ H)).sum())
    numbers = sum(factor.numel() for factor in stored)
    work.branched(name, BranchRecord(rank, numbers, returned / lacking if lacking > 0 else 0.0))


def check_in_memory(rank: int, on_disk: bool) -> None:
    """UsageError where branches are wanted of blocks that stay on disk."""
    if rank and on_disk:
        raise UsageError("low_rank wants its blocks in memory, and these stay on disk; use --offload off")


def check_ranks(adapter: DecoderAdapter, plan: Plan, rank: int) -> None:
    """UsageError where a planned linear can have no branch, or none of that rank."""
    blocks = zip(adapter.block_names, adapter.blocks, strict=True)
    routed = {f"{name}.{inside}" for name, block in blocks for inside in expert_linears(adapter.experts(block))}
    for name, target in plan.items():
        if name in routed:
            raise UsageError(
                f"low_rank {rank}: {name} is a matrix of an expert, and these get no branches; leave them as they are "
                "with --ignore experts, or prune without --low-rank"
            )
        if rank > min(target.shape):
            R, C = target.shape
            raise UsageError(
                f"low_rank {rank} is more than {name} of {R} x {C} can have; take {min(R, C)} or less, or --ignore it"
            )
