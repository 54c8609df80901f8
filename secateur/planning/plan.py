"""``plan``: what a run would do, take and be good for, before anything is paid.

    report = plan("HuggingFaceTB/SmolLM2-135M-Instruct", PruneConfig(sparsity=0.5))
    report.seconds["total"], report.memory["host"]["peak"], report.to_dict()

No weight is read: the config and the headers of the files make a model of shapes (``models/skeleton``), the linears are
selected as ``prune`` selects them, operations come from formulas (``cost``) and rates from probes of a few seconds
(``rates``). What only numbers can tell is left to the run and said in ``notes``.
"""

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from secateur.config import PruneConfig
from secateur.data.sources import KNOWN, parse_hub, read_texts
from secateur.data.tokens import check_seq_len
from secateur.models.adapter import DecoderAdapter
from secateur.models.outline import Outline, outline
from secateur.planning.rates import HEAD, Probe, measure
from secateur.planning.report import PlanReport, report
from secateur.planning.shapes import BlockShape, Routed, Run, Shared
from secateur.planning.subject import Subject, subject_of
from secateur.pruning.low_rank import check_in_memory
from secateur.pruning.selection import Selection, linear_shapes
from secateur.report.progress import Progress, Silent
from secateur.runs import resolve_device, resolve_precision, select_to_prune, with_text_needed

if TYPE_CHECKING:
    from secateur.runs import Source


def plan(
    model: "Source", config: PruneConfig, data: str | None = None, *, progress: Progress | None = None
) -> PlanReport:
    """What ``prune`` with the same arguments would do; it ends with the errors of that, as far as shapes tell them."""
    config, told = with_text_needed(replace(config, data=data or config.data)), progress or Silent()
    device = resolve_device(config.device)
    precision = resolve_precision(config.precision, device)
    config = replace(config, device=device, precision=precision)
    check_data(config.data)
    told.stage("read the config and the headers")
    with subject_of(model, config) as subject:
        context = getattr(subject.adapter.model.config, "max_position_embeddings", None)
        check_seq_len(config.seq_len, context)
        check_in_memory(config.low_rank, subject.on_disk(config.offload))
        selection = select_to_prune(subject.adapter, config)
        shapes = block_shapes(subject.adapter, selection)
    run = Run(config.samples, config.seq_len, config.batch, precision == "bfloat16" and subject.dtype == torch.float32)
    told.stage("measure this machine for a few seconds")
    rates = measure(probe_of(subject, config, shapes, run))
    return report(subject, config, selection, shapes, run, rates)


def check_data(data: str) -> None:
    """Refuse what ``prune`` would refuse without asking a hub; a local text is read, a hub's is not."""
    if data.startswith("hf:"):
        parse_hub(data, "calibration")
    elif data not in KNOWN:
        read_texts(data, "calibration")


# --------------------------------------------------------------------------------------------------------------- shapes


def block_shapes(adapter: DecoderAdapter, selection: Selection) -> list[BlockShape]:
    """The matrices of every block by role; blocks with the same linears share one look."""
    known: dict[tuple[Any, ...], Outline] = {}
    shapes = []
    for index, name in enumerate(adapter.block_names):
        linears = {key.removeprefix(f"{name}."): shape for key, shape in linear_shapes(adapter, [index]).items()}
        likeness = tuple(linears.items())
        roles = known[likeness] if likeness in known else outline(adapter, index)
        known[likeness] = roles
        planned = {key for key in linears if f"{name}.{key}" in selection.plan}
        shapes.append(block_shape(roles, linears, planned))
    return shapes


def block_shape(roles: Outline, linears: dict[str, tuple[int, int]], planned: set[str]) -> BlockShape:
    def shared(names: tuple[str, ...]) -> Shared:
        rows = {name: linears[name][0] for name in names}
        chosen = sum(R for name, R in rows.items() if name in planned)
        return Shared(sum(rows.values()), linears[names[0]][1], chosen)

    alike = Counter(
        (shared(first), shared((down,)), mixture.share) for mixture in roles.experts for first, down in mixture.members
    )
    return BlockShape(
        tuple(shared(names) for names in roles.attention),
        shared((roles.out,)) if roles.out else None,
        shared(roles.first) if roles.first else None,
        shared((roles.down,)) if roles.down else None,
        tuple(Routed(first, down, count, share) for (first, down, share), count in alike.items()),
    )


def probe_of(subject: Subject, config: PruneConfig, shapes: list[BlockShape], run: Run) -> Probe:
    largest = max(shapes, key=lambda shape: shape.size)
    settings = subject.adapter.model.config
    heads = getattr(settings, "num_attention_heads", None)
    width = largest.out.columns if largest.out else None
    head = width // heads if isinstance(heads, int) and heads and width and width % heads == 0 else HEAD
    device, precision = str(config.device), "bfloat16" if config.precision == "bfloat16" else "float32"
    return Probe(largest, run, config.target, device, precision, subject.dtype, head)
