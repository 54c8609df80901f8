"""The one-shot pipeline: blocks one at a time, each seeing what the pruned blocks before it produce.

``prune_blocks`` is a generator: it changes the model in place and yields after every block, so that whoever runs it
draws the progress bar, saves, or stops. Hidden states wait in host memory, beyond a budget in files; the block at work
is on the device.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor, nn

from secateur.core.plan import Plan, Target
from secateur.core.quantizers import Quantizer
from secateur.core.solvers import Solver
from secateur.core.sparsellm import Refined, SparseLLM
from secateur.errors import NumericalError
from secateur.models.adapter import DecoderAdapter
from secateur.models.offload import at_hand
from secateur.pruning.closed import closed
from secateur.pruning.hidden import Hidden
from secateur.pruning.layerwise import layerwise
from secateur.pruning.low_rank import compensate, dense_copy
from secateur.pruning.paper import paper
from secateur.pruning.ranks import Ranks
from secateur.pruning.records import BlockRecord, RoundRecord
from secateur.pruning.work import PROBE_TOKENS, RunOptions, Watcher, Work

MAX_DROPPED = 0.1
"""Share of calibration rows that may turn non-finite before the run stops."""
ERROR_ROWS = 2
"""Rows on which a block's output error is measured."""

Method = Solver | Quantizer | SparseLLM


class Beside(NamedTuple):
    """What else happens to a block, at the hands of whoever runs this."""

    before: Callable[[Work], None] = lambda work: None
    """Called before anything of the block is observed for its solves; may change it, but not what it computes."""
    watch: Callable[[Work], dict[nn.Module, Watcher]] = lambda work: {}
    """Modules of the pruned block, and who is to see what they are given."""


class State(NamedTuple):
    """Where a run stands between two blocks."""

    next: int
    """The block to go on with; all before it are pruned."""
    hidden: Hidden
    """Its inputs."""


class Finished(NamedTuple):
    """One block that is done."""

    record: BlockRecord
    hidden: Hidden
    """Inputs of the block after it."""


@torch.no_grad()
def prune_blocks(
    adapter: DecoderAdapter,
    windows: Int[Tensor, "rows S"],
    plan: Plan,
    method: Method,
    options: RunOptions,
    state: State | None = None,
    low_rank: int = 0,
    beside: Beside | None = None,
) -> Iterator[Finished]:
    """Prune the planned linears of ``adapter.model`` in place, block by block, in order.

    ``windows`` are calibration rows of token ids, this process's share of them where several prune together. ``state``
    goes on with a run whose first blocks are already pruned in the model. With ``low_rank`` every pruned linear gets a
    branch of that rank, which stays attached to the model (``models.branches``). A block whose weights lie on disk is
    in memory until the next one is asked for. Raises NumericalError where more than a tenth of the rows turn
    non-finite, ModelError where a block's structure is refused.
    """
    if method.needs == "nothing" and not low_rank and not beside:  # structure is observed all the same, on a few tokens
        windows = windows[:1, :PROBE_TOKENS]
    first, hidden = state or State(0, first_hidden(adapter, windows, options))
    last = max((i for i, name in enumerate(adapter.block_names) if block_targets(plan, name)), default=-1)
    for index, name in enumerate(adapter.block_names[first:], first):
        start = time.perf_counter()
        work = Work(adapter, index, hidden, block_targets(plan, name), options)
        with at_hand(work.block):
            work.block.to(options.device)
            error, refined = (
                (None, None) if not work.targets else prune_and_measure(work, method, low_rank, beside or Beside())
            )
            hidden = propagate(work) if not work.targets and index < last else work.hidden
            work.block.to("cpu")
            check_rows(name, len(windows), hidden, options.ranks)
            dropped, seconds = options.ranks.total(work.dropped), time.perf_counter() - start
            linears, rounds = tuple(work.records.values()), (*work.expert_rounds, *rounds_of(refined))
            record = BlockRecord(
                index, name, seconds, error, dropped, linears, rounds, work.seconds, tuple(work.refused)
            )
            yield Finished(record, hidden)


def first_hidden(adapter: DecoderAdapter, windows: Int[Tensor, "rows S"], options: RunOptions) -> Hidden:
    """Inputs of block 0."""
    return Hidden(options.budget, (adapter.first_hidden(rows).to("cpu") for rows in windows.split(options.batch)))


def prune_and_measure(work: Work, method: Method, low_rank: int, beside: Beside) -> tuple[float | None, Refined | None]:
    """Prune one block, move its hidden states on; the share of its work that is lost, and its FFN's iterates."""
    inputs = work.hidden.parted(ERROR_ROWS)[0]
    sample = [work.run(rows) for rows in inputs]
    beside.before(work)
    dense = dense_copy(work) if low_rank else None
    refined = prune_one(work, method)
    if dense is not None:
        compensate(work, dense, low_rank)
    work.hidden = propagate(work, beside.watch(work))
    outputs = work.hidden.parted(ERROR_ROWS)[0]
    return (None if work.dropped else lost_work(inputs, sample, outputs)), refined


def block_targets(plan: Plan, block_name: str) -> dict[str, Target]:
    """Targets of one block by the linear's name inside it."""
    prefix = block_name + "."
    return {name.removeprefix(prefix): target for name, target in plan.items() if name.startswith(prefix)}


def prune_one(work: Work, method: Method) -> Refined | None:
    """Prune one block by the method; SparseLLM also tells what its FFN went through."""
    if isinstance(method, SparseLLM):
        return closed(work, method) if method.mode == "closed" else paper(work, method)
    layerwise(work, method)
    return None


def propagate(work: Work, watchers: dict[nn.Module, Watcher] | None = None) -> Hidden:
    """Hidden states after the pruned block; rows that turned non-finite are dropped and counted."""
    with work.forwards("propagate"):
        return work.watched_pass(watchers or {})


def check_rows(name: str, own: int, hidden: Hidden, ranks: Ranks) -> None:
    started, left = ranks.total(own), ranks.total(hidden.rows)
    if left < (1 - MAX_DROPPED) * started:
        raise NumericalError(
            f"{started - left} of {started} calibration rows are not finite after {name} (a tenth may be); "
            "load the model in a wider dtype (--dtype float32), or use a lower sparsity or another method"
        )


def lost_work(inputs: Hidden, dense: Sequence[Tensor], pruned: Hidden) -> float:
    """|pruned - dense|² / |dense - input|² over the sampled rows."""
    lost = sum(float((p.float() - d.float()).square().sum()) for d, p in zip(dense, pruned, strict=True))
    done = sum(float((d.float() - x.float()).square().sum()) for x, d in zip(inputs, dense, strict=True))
    return lost / done if done > 0 else 0.0


def rounds_of(refined: Refined | None) -> tuple[RoundRecord, ...]:
    return tuple(RoundRecord(*r) for r in refined.rounds) if refined else ()
