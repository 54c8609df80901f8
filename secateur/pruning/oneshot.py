"""The one-shot pipeline: blocks one at a time, each seeing what the pruned blocks before it produce.

``prune_blocks`` is a generator: it changes the model in place and yields one record per block, so that whoever runs it draws
the progress bar, saves, or stops. Hidden states wait in host memory; the block at work is on the device.
"""

import time
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.core.pattern import Pattern
from secateur.core.plan import Plan, Target
from secateur.core.solvers import Solver
from secateur.core.sparsellm import Refined, SparseLLM
from secateur.errors import NumericalError
from secateur.models.adapter import DecoderAdapter
from secateur.models.layout import Layout, observe
from secateur.pruning.closed import closed
from secateur.pruning.layerwise import layerwise
from secateur.pruning.paper import paper
from secateur.pruning.records import BlockRecord, RoundRecord
from secateur.pruning.work import Hidden, RunOptions, Work

PROBE_TOKENS = 64
"""Tokens of the first calibration row on which block structure is observed."""
MAX_DROPPED = 0.1
"""Share of calibration rows that may turn non-finite before the run stops."""
ERROR_CHUNKS = 2
"""Chunks on which a block's output error is measured."""

Method = Solver | SparseLLM


def uniform_plan(adapter: DecoderAdapter, pattern: Pattern, blocks: Sequence[int]) -> Plan:
    """Every linear of these blocks to the same pattern. ValueError where a shape cannot carry it."""
    targets = {}
    for index in blocks:
        for name, linear in adapter.linears(adapter.blocks[index]).items():
            R, C = adapter.read(linear).shape
            targets[f"{adapter.block_names[index]}.{name}"] = Target((R, C), pattern)
    return Plan(targets)


@torch.no_grad()
def prune_blocks(
    adapter: DecoderAdapter, windows: Int[Tensor, "rows S"], plan: Plan, method: Method, options: RunOptions
) -> Iterator[BlockRecord]:
    """Prune the planned linears of ``adapter.model`` in place; one record per block, in order.

    ``windows`` are calibration rows of token ids. Raises NumericalError where more than a tenth of them turn
    non-finite, ModelError where a block's structure is refused.
    """
    hidden: Hidden = [adapter.first_hidden(rows).to("cpu") for rows in windows.split(options.batch)]
    probe = hidden[0][:1, :PROBE_TOKENS]
    started_rows = len(windows)
    last = max((i for i, name in enumerate(adapter.block_names) if block_targets(plan, name)), default=-1)
    for index, name in enumerate(adapter.block_names):
        start = time.perf_counter()
        targets = block_targets(plan, name)
        call = adapter.calls(*probe.shape[:2])[index]
        work = Work(adapter, index, observe_block(adapter, index, probe, call, targets), hidden, targets, options)
        work.block.to(options.device)
        needs_tokens = method.needs != "nothing" and index <= last
        sample = [work.run(rows) for rows in hidden[:ERROR_CHUNKS]] if needs_tokens and targets else []
        refined = prune_one(work, method) if targets else None
        probe = adapter.replay(index, probe, call)
        outputs, dropped = propagate(work) if needs_tokens else (hidden, 0)
        work.block.to("cpu")
        error = lost_work(hidden, sample, outputs) if sample and not dropped else None
        hidden = outputs
        check_rows(name, started_rows, hidden)
        yield BlockRecord(
            index, name, time.perf_counter() - start, error, dropped, tuple(work.records), rounds_of(refined), work.seconds
        )


def block_targets(plan: Plan, block_name: str) -> dict[str, Target]:
    """Targets of one block by the linear's name inside it."""
    prefix = block_name + "."
    return {name.removeprefix(prefix): target for name, target in plan.items() if name.startswith(prefix)}


def observe_block(adapter, index, probe, call, targets) -> Layout | None:
    return observe(adapter, index, probe, call) if targets else None


def prune_one(work: Work, method: Method) -> Refined | None:
    """Prune one block by the method; SparseLLM also tells what its FFN went through."""
    if isinstance(method, SparseLLM):
        return closed(work, method) if method.mode == "closed" else paper(work, method)
    layerwise(work, method)
    return None


def propagate(work: Work) -> tuple[Hidden, int]:
    """Hidden states after the block, rows that turned non-finite dropped and counted."""
    outputs, dropped = [], 0
    with work.forwards("propagate"):
        for rows in work.hidden:
            out = work.run(rows)
            finite = torch.isfinite(out).flatten(1).all(dim=1)
            dropped += int((~finite).sum())
            if finite.any():
                outputs.append(out if finite.all() else out[finite])
    return outputs, dropped


def check_rows(name: str, started: int, hidden: Hidden) -> None:
    left = sum(len(rows) for rows in hidden)
    if left < (1 - MAX_DROPPED) * started:
        raise NumericalError(
            f"{started - left} of {started} calibration rows are not finite after {name} (a tenth may be); "
            "load the model in a wider dtype (--dtype float32), or use a lower sparsity or another method"
        )


def lost_work(inputs: Hidden, dense: Hidden, pruned: Hidden) -> float:
    """|pruned - dense|² / |dense - input|² over the sampled chunks."""
    pairs = list(zip(inputs, dense, pruned, strict=False))
    lost = sum(float((p.float() - d.float()).square().sum()) for _, d, p in pairs)
    done = sum(float((d.float() - x.float()).square().sum()) for x, d, _ in pairs)
    return lost / done if done > 0 else 0.0


def rounds_of(refined: Refined | None) -> tuple[RoundRecord, ...]:
    return tuple(RoundRecord(*r) for r in refined.rounds) if refined else ()
