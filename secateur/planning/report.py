"""What ``plan`` tells: the formulas' operations at the measured rates, peaks of memory, and what the result would take.

A report is made of the selected linears, the shapes of the blocks and the rates; the model itself is asked for nothing
but its sizes.
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from secateur.config import PruneConfig
from secateur.core.sparsellm import SparseLLM
from secateur.models.adapter import DecoderAdapter
from secateur.models.linears import stored_transposed
from secateur.planning.cost import Cost, forward
from secateur.planning.cost_sparsellm import block_stages
from secateur.planning.rates import Rates
from secateur.planning.shapes import BlockShape, Run
from secateur.planning.sizes import BRANCHED, memory, result
from secateur.planning.subject import Subject
from secateur.pruning.selection import Selection
from secateur.report.runtimes import BRANCHES, CONV1D, EXPERTS, alternatives, runtimes_for, smaller_lines, warnings_for
from secateur.report.stored_page import MASKED

GGUF_PARSE_BYTES = 8e6
"""Bytes of a GGUF file that are parsed a second: its vocabulary, in pure Python, and the dequantization."""
NOTES = (
    "roles of the linears are taken from shapes and order; the FFN's form is verified when pruning begins",
    "time without reading and tokenizing the text; rounds of closed mode may end early",
)
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


def report(
    subject: Subject, config: PruneConfig, selection: Selection, shapes: list[BlockShape], run: Run, rates: Rates
) -> PlanReport:
    chosen, pattern = selection.plan, config.target
    stages = stage_rows(shapes, config, run, rates)
    held, taken = memory(subject, config, chosen, shapes, run), result(subject, chosen, config)
    others = {name: taken["bytes"][name] for name in alternatives(chosen.inputs)}
    return PlanReport(
        model=subject.to_dict(),
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


def held_by(adapter: DecoderAdapter, rank: int) -> set[str]:
    """What the pruned model will hold that some exports refuse."""
    found = {
        BRANCHES: rank > 0,
        EXPERTS: any(adapter.experts(block) for block in adapter.blocks),
        CONV1D: any(map(stored_transposed, adapter.model.modules())),
    }
    return {name for name, there in found.items() if there}


def unknown_roles(shapes: list[BlockShape], config: PruneConfig) -> list[str]:
    strange = sum(shape.planned and shape.down is None and not shape.experts for shape in shapes)
    if not strange or not isinstance(config.method, SparseLLM):
        return []
    return [f"{strange} blocks show no FFN by their shapes: SparseLLM may refuse them, and the time is a lower bound"]
