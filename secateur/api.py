"""Secateur from Python: ``prune`` and ``evaluate``, the two verbs that the command line is a thin skin of.

    result = prune("HuggingFaceTB/SmolLM2-135M-Instruct", PruneConfig(sparsity=0.5), data="c4", out="smaller")
    result.model, result.records, result.report

``prune`` changes the model it works on. With ``out`` it saves, opens what it has saved again, and fails unless every
promise is kept; nothing appears at ``out`` before that. Memory: the model once, in host memory, plus what
``pruning/oneshot.py`` and ``evaluation/perplexity.py`` state.
"""

import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from secateur.config import Device, Dtype, Method, Precision, PruneConfig, config_from_dict
from secateur.core.plan import Plan
from secateur.data.sources import Texts, read_texts
from secateur.data.tokens import check_seq_len, sample_windows, tokenize
from secateur.errors import ArtefactError, DeviceError, UsageError
from secateur.evaluation.inspect import inspect
from secateur.evaluation.perplexity import PerplexityResult, evaluate_text
from secateur.models.adapter import DecoderAdapter
from secateur.models.load import Loaded, fingerprint, load
from secateur.models.save import save, staged
from secateur.pruning.oneshot import BlockRecord, RunOptions, prune_blocks, uniform_plan
from secateur.report.artefact import promises_of, write_artefact, write_report
from secateur.report.comparison import Comparison, compare
from secateur.report.facts import Stopwatch, peak_memory, versions
from secateur.report.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Source = str | os.PathLike[str] | PreTrainedModel | Loaded
    """A model: by name or path, as an object, or as ``models.load`` gives it."""

BUILT_IN = ("demo", "embedded")
"""Names that mean the same everywhere, whatever lies in the working directory."""
PROBE_TOKENS = 16
"""Tokens on which a replay of all blocks is compared with the model's own forward."""


@dataclass(frozen=True)
class PruneResult:
    """The pruned model and everything that was noted on the way."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    records: list[BlockRecord]
    report: dict[str, Any]
    """What ``secateur/report.json`` holds."""


def prune(
    model: "Source",
    config: PruneConfig,
    data: str | None = None,
    out: str | os.PathLike[str] | None = None,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Prune a model, given by its source or as an object (then with its tokenizer), which is changed in place.

    ``data`` overrides ``config.data``. ``out`` is a directory that does not exist yet or that an earlier run wrote.
    """
    config = replace(config, data=data or config.data)
    device = resolve_device(config.device)
    watch = Stopwatch(progress)
    with staged(Path(out), overwrite=True) if out is not None else nullcontext() as folder:
        with watch.stage("data", f"read {config.data}"):
            texts = read_texts(config.data, "calibration")
        loaded = _open(model, tokenizer, config.dtype, watch)
        windows = _windows(loaded, texts, config)
        adapter = DecoderAdapter(loaded.model)
        plan = _plan(adapter, config)
        with watch.stage("verify", "compare a replay of the blocks with the model"):
            adapter.verify(windows[:1, :PROBE_TOKENS])
        precision = resolve_precision(config.precision, device)
        options = RunOptions(device, config.batch, precision)
        records = _run(adapter, windows, plan, config.method, options, watch)
        settled = _settled(config, loaded, device, precision, len(adapter.blocks))
        report = _report(loaded, settled, plan, records, texts, len(adapter.blocks))
        report["left_alone"] = adapter.left_alone()
        if folder is not None:
            _save(folder, loaded, settled, plan, records, watch)
        report |= {"out": None if out is None else str(out), "seconds": {**watch.seconds, "total": watch.total}}
        report["peak_memory_bytes"] = peak_memory()
        if folder is not None:
            write_report(folder / "secateur", report)
    return PruneResult(loaded.model, loaded.tokenizer, records, report)


def resolve_device(device: Device) -> str:
    """What ``auto`` means here; DeviceError where the device asked for is not."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda, but torch sees no CUDA device here; use --device cpu or auto")
    return device


def resolve_precision(precision: Precision, device: str) -> Literal["float32", "bfloat16"]:
    """What ``auto`` means here: bfloat16 on a processor with instructions for its products, else float32."""
    if precision != "auto":
        return precision
    able = torch.cpu.get_capabilities() if device == "cpu" else {}
    return "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"


def _open(
    model: "Source",
    tokenizer: "PreTrainedTokenizerBase | None",
    dtype: Dtype,
    watch: Stopwatch,
) -> Loaded:
    if isinstance(model, Loaded):
        return model
    if isinstance(model, str | os.PathLike):
        with watch.stage("load", f"load {os.fspath(model)}"):
            return load(os.fspath(model), dtype=dtype)
    if tokenizer is None:
        raise UsageError("a model given as an object needs its tokenizer; pass tokenizer=...")
    model.requires_grad_(False).eval()
    return Loaded(model, tokenizer, model.name_or_path or type(model).__name__, fingerprint(model))


def _windows(loaded: Loaded, texts: Texts, config: PruneConfig) -> torch.Tensor:
    check_seq_len(config.seq_len, getattr(loaded.model.config, "max_position_embeddings", None))
    tokens = tokenize(texts, loaded.tokenizer)
    return sample_windows(tokens, config.samples, config.seq_len, torch.Generator().manual_seed(config.seed))


def _plan(adapter: DecoderAdapter, config: PruneConfig) -> Plan:
    try:
        return uniform_plan(adapter, config.target, config.block_range(len(adapter.blocks)))
    except ValueError as error:  # a width that the pattern does not divide
        raise UsageError(str(error)) from error


def _run(
    adapter: DecoderAdapter,
    windows: torch.Tensor,
    plan: Plan,
    method: Method,
    options: RunOptions,
    watch: Stopwatch,
) -> list[BlockRecord]:
    records = []
    with watch.stage("prune"):
        for record in prune_blocks(adapter, windows, plan, method, options):
            records.append(record)
            error = "not pruned" if record.output_error is None else f"output error {record.output_error:.4f}"
            said = f"{record.name}, {error}, {record.seconds:.1f} s"
            watch.progress.update(len(records), len(adapter.blocks), said)
    return records


def _settled(config: PruneConfig, loaded: Loaded, device: str, precision: str, total: int) -> PruneConfig:
    """The config with nothing left to circumstances: no auto, no relative path, blocks by number."""
    blocks = config.block_range(total)
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    fields = {"device": device, "dtype": dtype, "precision": precision, "blocks": f"{blocks.start}:{blocks.stop}"}
    return config_from_dict({**config.to_dict(), **fields, "data": _lasting(config.data)})


def _lasting(source: str) -> str:
    """A model or text that is named by a path, named so that it is found from any directory."""
    path = Path(source).expanduser()
    return str(path.resolve()) if source not in BUILT_IN and path.exists() else source


def _report(
    loaded: Loaded, config: PruneConfig, plan: Plan, records: list[BlockRecord], texts: Texts, blocks: int
) -> dict[str, Any]:
    linears = [linear for record in records for linear in record.linears]
    notes = [f"{linear.name}: {linear.note}" for linear in linears if linear.note]
    zeros = sum(linear.sparsity * plan[linear.name].size for linear in linears)
    errors = [record.output_error for record in records if record.output_error is not None]
    return {
        "model": {"source": loaded.source, "class": type(loaded.model).__name__, "fingerprint": loaded.fingerprint},
        "recipe": config.to_dict(),
        "pattern": {"short": str(config.target), "words": config.target.words()},
        "sparsity": {"requested": plan.sparsity, "achieved": zeros / plan.size},
        "linears": len(linears),
        "weights": plan.size,
        "blocks": {"pruned": len(config.block_range(blocks)), "total": blocks},
        "output_error": {"mean": sum(errors) / len(errors), "last": errors[-1]} if errors else None,
        "data": {**texts.provenance, "name": texts.name, "samples": config.samples, "seq_len": config.seq_len},
        "seed": config.seed,
        "dropped_rows": sum(record.dropped_rows for record in records),
        "warnings": notes,
        "versions": versions(),
    }


def _save(
    folder: Path, loaded: Loaded, config: PruneConfig, plan: Plan, records: list[BlockRecord], watch: Stopwatch
) -> None:
    source, promises = _lasting(loaded.source), promises_of(loaded.model, plan)
    with watch.stage("save"):
        save(loaded.model, loaded.tokenizer, folder)
        write_artefact(folder / "secateur", source=source, config=config, records=records, promises=promises)
    with watch.stage("inspect", "check what was saved"):
        broken = inspect(folder).broken
    if broken:
        raise ArtefactError(f"the saved model breaks {len(broken)} promises, the first: {broken[0]}; nothing was kept")


# ---- evaluation


def evaluate(
    model: "Source",
    data: str | Sequence[str],
    *,
    baseline: "Source | None" = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    seq_len: int = 2048,
    limit: int | None = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    batch: int = 1,
    progress: Progress | None = None,
) -> list[Comparison]:
    """Perplexity of a model, and of a baseline beside it, on each text. ``limit`` windows of ``seq_len`` at most."""
    watch = Stopwatch(progress)
    place = resolve_device(device)
    texts = [read_texts(name, "evaluation") for name in ([data] if isinstance(data, str) else data)]

    def measure(which: "Source") -> list[PerplexityResult]:
        loaded = _open(which, tokenizer, dtype, watch)
        home = loaded.model.device
        torch.nn.Module.to(loaded.model, place)
        results = [_perplexity(loaded, text, seq_len, limit, batch, watch.progress) for text in texts]
        torch.nn.Module.to(loaded.model, home)
        return results

    results = measure(model)
    if baseline is None:
        return [Comparison(result) for result in results]
    return [compare(result, other) for result, other in zip(results, measure(baseline), strict=True)]


def _perplexity(
    loaded: Loaded, texts: Texts, seq_len: int, limit: int | None, batch: int, progress: Progress
) -> PerplexityResult:
    progress.stage(f"perplexity of {loaded.source} on {texts.name}")
    return evaluate_text(
        loaded.model, loaded.tokenizer, texts, seq_len=seq_len, limit=limit, batch=batch, progress=progress.update
    )
