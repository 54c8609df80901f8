"""What ``plan`` tells: the formulas' operations at the measured rates, peaks of memory, and what the result would take.

A report is made of the selected linears, the shapes of the blocks and the rates; the model itself is asked for nothing
but its sizes.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import psutil
import torch
from transformers.pytorch_utils import Conv1D

from secateur.config import PruneConfig
from secateur.core.pattern import VALUE_BITS
from secateur.core.plan import Plan
from secateur.core.sparsellm import SparseLLM
from secateur.models.adapter import DecoderAdapter
from secateur.models.offload import is_offloaded, stays_on_disk
from secateur.planning.cost import FLOAT32, Cost, forward
from secateur.planning.cost_sparsellm import block_stages
from secateur.planning.footprint import footprint
from secateur.planning.rates import Rates
from secateur.planning.shapes import BlockShape, Run
from secateur.pruning.selection import Selection
from secateur.report.runtimes import (
    ALTERNATIVES,
    BRANCHES,
    CONV1D,
    EXPERTS,
    competitors,
    runtimes_for,
    smaller_lines,
    warnings_for,
)
from secateur.report.stored_page import MASKED

GGUF_PARSE_BYTES = 8e6
"""Bytes of a GGUF file that are parsed a second: its vocabulary, in pure Python, and the dequantization."""
GGUF_COPIES = 2
"""Of a tensor in float32 while it is dequantized, besides the one that the model gets."""
NOTES = (
    "roles of the linears are taken from shapes and order; the FFN's form is verified when pruning begins",
    "time without reading and tokenizing the text; rounds of closed mode may end early",
)
BRANCHED = "mask, 16 bit values, branches"
FITS = "time without the singular values behind the branches: R x C of them for every linear"
EVENLY = "experts are counted as if the router spread the tokens evenly"


@dataclass(frozen=True)
class PlanReport:
    """Everything ``secateur plan`` tells; plain values, the same keys for every model and method."""

    model: dict[str, Any]
    """source, class, dtype, parameters, bytes."""
    recipe: dict[str, Any]
    """The request, as a recipe file would hold it, device and precision settled."""
    pattern: dict[str, str]
    linears: list[dict[str, Any]]
    """One row per role: role, count, shape, pattern, weights, names."""
    skipped: list[dict[str, Any]]
    """One row per reason: why, count, names."""
    sparsity: dict[str, float]
    """planned: share of zeros in the planned linears; model: in all parameters."""
    blocks: dict[str, int]
    stages: list[dict[str, Any]]
    """One row per stage: name, operations, bytes, seconds."""
    seconds: dict[str, float]
    """load, prune, keep (finished blocks and hidden states, on disk), save and total on an idle machine; busy: the
    total with the load that it has now."""
    rates: dict[str, float]
    """Measured here and now, see ``rates.Rates``."""
    memory: dict[str, dict[str, float]]
    """Bytes in host, device and disk, by purpose and at their peak."""
    result: dict[str, Any]
    """bits_per_weight of the planned linears by storage, and bytes of the whole model."""
    runtimes: list[dict[str, str]]
    warnings: list[str]
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Subject:
    """The model as a plan sees it."""

    adapter: DecoderAdapter
    source: str
    dtype: torch.dtype
    file_bytes: int | None
    gguf: bool

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.adapter.model.parameters())

    @property
    def bytes(self) -> int:
        return self.parameters * self.dtype.itemsize

    @property
    def unpacking(self) -> int:
        """Bytes that reading a GGUF file takes besides the model: the file, and copies of its largest tensor."""
        if not self.gguf:
            return 0
        largest = max(p.numel() for p in self.adapter.model.parameters())
        return (self.file_bytes or 0) + GGUF_COPIES * largest * FLOAT32

    def on_disk(self, offload: Literal["auto", "on", "off"]) -> bool:
        """Whether the run leaves the blocks there; an object has them where they are."""
        if self.file_bytes is None:
            return is_offloaded(self.adapter.model)
        return stays_on_disk(offload, self.file_bytes, gguf=self.gguf)

    @property
    def outside_blocks(self) -> int:
        """Bytes of embeddings, last norm and head."""
        inside = sum(p.numel() for block in self.adapter.blocks for p in block.parameters())
        return (self.parameters - inside) * self.dtype.itemsize


def report(
    subject: Subject, config: PruneConfig, selection: Selection, shapes: list[BlockShape], run: Run, rates: Rates
) -> PlanReport:
    stages = stage_rows(shapes, config, run, rates)
    held = memory(subject, config, selection.plan, shapes, run)
    chosen, pattern = selection.plan, config.target
    model, taken = subject.adapter.model, result(subject, selection, config)
    others = {name: taken["bytes"][name] for name in ALTERNATIVES}
    return PlanReport(
        model={
            "source": subject.source,
            "class": type(model).__name__,
            "dtype": str(subject.dtype).removeprefix("torch."),
            "parameters": subject.parameters,
            "bytes": subject.bytes,
        },
        recipe=config.to_dict(),
        pattern={"short": str(pattern), "words": config.words},
        linears=linear_rows(subject.adapter, selection),
        skipped=[row.to_dict() for row in selection.skipped],
        sparsity={"planned": chosen.sparsity, "model": chosen.sparsity * chosen.size / subject.parameters},
        blocks={"pruned": sum(shape.planned for shape in shapes), "total": len(shapes)},
        stages=stages,
        seconds=total_seconds(subject, stages, rates, held["disk"]),
        rates=rates.to_dict(),
        memory=held,
        result=taken,
        runtimes=[row.to_dict() for row in runtimes_for(pattern, held_by(subject.adapter, config.low_rank))],
        warnings=warnings_for(pattern, subject.parameters)
        + unknown_roles(shapes, config)
        + smaller_lines(taken["bytes"].get(BRANCHED, taken["bytes"][MASKED]), others, "of a mask and 16 bit values"),
        notes=[
            *NOTES,
            *([EVENLY] if any(shape.experts for shape in shapes) else []),
            *([FITS] if config.low_rank else []),
        ],
    )


def linear_rows(adapter: DecoderAdapter, selection: Selection) -> list[dict[str, Any]]:
    """Planned linears grouped by their name inside the block and shape; experts of all numbers together."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    for block in adapter.block_names:
        for name, target in selection.plan.items():
            if name.startswith(f"{block}."):
                role = re.sub(r"\.\d+\.", ".*.", name.removeprefix(f"{block}."))
                key = (role, target.shape)
                rows.setdefault(key, []).append(name)
    return [
        {
            "role": role,
            "count": len(names),
            "shape": list(shape),
            "pattern": " to ".join(ends(str(selection.plan[name].pattern) for name in names)),
            "weights": len(names) * shape[0] * shape[1],
            "names": names,
        }
        for (role, shape), names in rows.items()
    ]


def ends(texts: Iterable[str]) -> list[str]:
    """The first and the last of them, or the one that they all are."""
    first, *_, last = [*dict.fromkeys(texts)] * 2
    return [first] if first == last else [first, last]


def stage_rows(shapes: list[BlockShape], config: PruneConfig, run: Run, rates: Rates) -> list[dict[str, Any]]:
    """Stages of all blocks added up; a block that is passed through costs a forward, one behind the last nothing."""
    total: dict[str, Cost] = {}
    last = max(index for index, shape in enumerate(shapes) if shape.planned)
    for shape in shapes[: last + 1]:
        one = (
            block_stages(shape, config.method, run, config.low_rank)
            if shape.planned
            else {"propagate": forward(shape, run.tokens, run)}
        )
        for name, cost in one.items():
            total[name] = total.get(name, Cost()) + cost
    return [
        {"name": name, "operations": cost.operations, "bytes": cost.streamed, "seconds": rates.seconds(cost)}
        for name, cost in total.items()
    ]


def total_seconds(
    subject: Subject, stages: list[dict[str, Any]], rates: Rates, disk: dict[str, float]
) -> dict[str, float]:
    """Loading reads the checkpoint (GGUF: parses it), every finished block is kept with the hidden states behind it,
    saving writes the model and inspecting reads it again."""
    load = (subject.file_bytes or subject.bytes) / (GGUF_PARSE_BYTES if subject.gguf else rates.disk)
    save = 2 * subject.bytes / rates.disk
    prune = sum(row["seconds"] for row in stages)
    keep = (disk["finished blocks"] + len(subject.adapter.blocks) * disk["hidden states"] / 2) / rates.disk
    total = load + prune + keep + save
    return {"load": load, "prune": prune, "keep": keep, "save": save, "total": total, "busy": total * rates.slowdown}


def memory(
    subject: Subject, config: PruneConfig, plan: Plan, shapes: list[BlockShape], run: Run
) -> dict[str, dict[str, float]]:
    """Peaks of host, device and disk, where the result goes to a directory.

    What this process holds now stands for interpreter and libraries of the run. A block is counted apart from the model
    where it is elsewhere: on a device, or brought from disk. Until the result is complete the disk holds the finished
    blocks, the hidden states twice while those of the next block replace them, and what finds no room in memory.
    """
    parts = max(
        (
            footprint(shape, config.method, run, subject.dtype.itemsize, config.low_rank)
            for shape in shapes
            if shape.planned
        ),
        key=lambda f: f.hidden + f.work,
    )
    lazy = subject.on_disk(config.offload)
    host = {"interpreter": float(psutil.Process().memory_info().rss)}
    host["outside the blocks" if lazy else "model"] = float(subject.outside_blocks if lazy else subject.bytes)
    named = parts.to_dict()
    waiting, state = named.pop("hidden"), named.pop("state")
    kept = min(waiting, config.hidden_memory * 1e9)
    near = {name: size for name, size in named.items() if name != "block" or lazy} if config.device == "cpu" else {}
    host |= {"hidden": kept, **near}
    device = {} if config.device == "cpu" else named
    loading = sum(list(host.values())[:2]) + subject.unpacking
    branches = branch_numbers(plan, config.low_rank) * subject.dtype.itemsize
    disk = {
        "model": float(subject.bytes + branches),
        "finished blocks": float(plan.size * subject.dtype.itemsize + branches),
        "hidden states": 2 * state,
        "spilled": waiting - kept,
    }
    return {
        "host": {**host, "peak": max(sum(host.values()), loading)},
        "device": {**device, "peak": sum(device.values())},
        "disk": {**disk, "peak": sum(disk.values())},
    }


def result(subject: Subject, selection: Selection, config: PruneConfig) -> dict[str, Any]:
    """Sizes: as saved (zeros stored), as a mask and 16-bit values, and what dense formats would take."""
    bits, weights = selection.plan.bits_per_weight, selection.plan.size
    storages = {"saved, zeros stored": 8.0 * subject.dtype.itemsize, MASKED: bits, **ALTERNATIVES}
    numbers = branch_numbers(selection.plan, config.low_rank)
    if numbers:
        storages[BRANCHED] = bits + VALUE_BITS * numbers / weights
    rest = (subject.parameters - weights) * 2
    sizes = {name: rest + weights * per / 8 for name, per in storages.items()} | competitors(rest, weights)
    return {
        "bits_per_weight": storages,
        "bytes": sizes | {"saved, zeros stored": subject.bytes + numbers * subject.dtype.itemsize},
    }


def branch_numbers(plan: Plan, rank: int) -> int:
    """In the factors of all branches."""
    return sum(rank * sum(target.shape) for target in plan.values())


def held_by(adapter: DecoderAdapter, rank: int) -> set[str]:
    """What the pruned model will hold that some exports refuse."""
    found = {
        BRANCHES: rank > 0,
        EXPERTS: any(adapter.experts(block) for block in adapter.blocks),
        CONV1D: any(isinstance(module, Conv1D) for module in adapter.model.modules()),
    }
    return {name for name, there in found.items() if there}


def unknown_roles(shapes: list[BlockShape], config: PruneConfig) -> list[str]:
    strange = sum(shape.planned and shape.down is None and not shape.experts for shape in shapes)
    if not strange or not isinstance(config.method, SparseLLM):
        return []
    return [f"{strange} blocks show no FFN by their shapes: SparseLLM may refuse them, and the time is a lower bound"]
