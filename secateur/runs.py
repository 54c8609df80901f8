"""One prune run, from a request to a result: what is settled before the first block, the blocks, the saved directory.

Nothing appears at OUT before everything in it has been opened again and checked; until then finished blocks are kept
beside it (``pruning.workdir``), and whoever kills the run loses at most one block of work.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch

from secateur.config import Device, Dtype, Precision, PruneConfig, config_from_dict, dump_recipe
from secateur.core.pattern import VALUE_BITS
from secateur.core.plan import Plan
from secateur.core.sparsellm import SparseLLM
from secateur.data.sources import KNOWN, Texts, read_texts
from secateur.data.tokens import check_seq_len, sample_windows, tokenize
from secateur.errors import ArtefactError, UsageError
from secateur.evaluation.inspect import Inspection, inherited, inspect
from secateur.models.adapter import DecoderAdapter
from secateur.models.branches import attached, refuse_branches
from secateur.models.load import Loaded, check_device, fingerprint, load
from secateur.models.offload import is_offloaded, moved
from secateur.models.promises import Inherited
from secateur.models.save import clear_leftovers, save, staged
from secateur.pruning.ffn import check_whole_ffns
from secateur.pruning.hidden import Budget
from secateur.pruning.low_rank import check_in_memory, check_ranks
from secateur.pruning.oneshot import BlockRecord, RunOptions, prune_blocks
from secateur.pruning.ranks import ALONE, Ranks
from secateur.pruning.records import LinearRecord
from secateur.pruning.selection import Selection, select
from secateur.pruning.work import PROBE_TOKENS
from secateur.pruning.workdir import Workdir, opened
from secateur.quantize_config import QuantizeConfig
from secateur.report.artefact import promised, promises_of, read_records, write_artefact, write_report
from secateur.report.facts import Stopwatch, versions
from secateur.report.run_report import run_report
from secateur.report.stored_page import told_room
from secateur.train_config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Source = str | os.PathLike[str] | PreTrainedModel | Loaded
    """A model: by name or path, as an object, or as ``models.load`` gives it."""

Config = TypeVar("Config", PruneConfig, QuantizeConfig)
Record = TypeVar("Record")
BUILT_IN = ("demo", "embedded", *KNOWN)
"""Names that mean the same everywhere, whatever lies in the working directory."""
MACHINE = ("offload", "hidden_memory")
"""Keys of a recipe that change how a machine is used and not one byte of the result."""
VERIFY_TOKENS = 16
"""Tokens on which a replay of all blocks is compared with the model's own forward."""


@dataclass(frozen=True)
class Result(Generic[Record]):
    """A model as it was saved, and everything that was noted on the way."""

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    records: list[Record]
    """Of every block, or of every training step."""
    report: dict[str, Any]
    """What ``secateur/report.json`` holds."""


@dataclass(frozen=True)
class PruneRun:
    """Everything that is settled before the first block."""

    loaded: Loaded
    adapter: DecoderAdapter
    texts: Texts
    windows: torch.Tensor
    config: PruneConfig
    """With nothing left to circumstances."""
    selection: Selection
    inherited: Inherited
    watch: Stopwatch
    ranks: Ranks

    @classmethod
    def prepare(
        cls,
        model: "Source",
        tokenizer: "PreTrainedTokenizerBase | None",
        config: PruneConfig,
        watch: Stopwatch,
        ranks: Ranks = ALONE,
    ) -> "PruneRun":
        config, device = with_text_needed(config), resolve_device(config.device)
        with watch.stage("data", f"read {config.data}"):
            texts = read_texts(config.data, "calibration")
        loaded = open_model(model, tokenizer, config.dtype, watch, config.offload)
        refuse_branches(attached(loaded.model), loaded.source)
        check_in_memory(config.low_rank, is_offloaded(loaded.model))
        windows = windows_of(loaded, texts, config)
        if ranks.size > len(windows) and config.needs_text:
            raise UsageError(f"{ranks.size} processes for {len(windows)} samples; start fewer, or use more samples")
        adapter = DecoderAdapter(loaded.model)
        selection = select_to_prune(adapter, config)
        settled = _settled(config, loaded, device, len(adapter.blocks))
        rest = inherited_by(loaded, selection.plan)
        return cls(loaded, adapter, texts, windows, settled, selection, rest, watch, ranks)

    @property
    def plan(self) -> Plan:
        return self.selection.plan

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the bytes: an unfinished run goes on only where all of it is the same."""
        tokens = hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()[:16]
        return {
            "recipe": {key: value for key, value in self.config.to_dict().items() if key not in MACHINE},
            "model": self.loaded.fingerprint,
            "tokens": tokens,
            "processes": self.ranks.size,
            "versions": versions(),
        }

    @property
    def own_windows(self) -> torch.Tensor:
        """This process's share of the calibration; a method that needs none shows all of it to everybody."""
        if not self.config.needs_text:
            return self.windows
        share = self.ranks.share(len(self.windows))
        return self.windows[share.start : share.stop]

    def in_memory(self) -> Result[BlockRecord]:
        if is_offloaded(self.loaded.model):
            raise UsageError(
                "a model whose blocks stay on disk needs an OUT to be pruned to; give one, or offload='off'"
            )
        with moved(self.loaded.model, "cpu"):
            self.verify()
            budget = Budget()
            records = self.blocks(budget)
        return Result(self.loaded.model, self.loaded.tokenizer, records, self.report(records, budget))

    def into(self, out: Path, resume: bool) -> Result[BlockRecord]:
        """Prune, save, open what was saved again, check it; all or nothing at ``out``."""
        with moved(self.loaded.model, "cpu"), opened(out, self.identity, resume=resume, ranks=self.ranks) as work:
            self.verify()
            before = work.kept
            budget = work.budget(int(self.config.hidden_memory * 1e9))
            records = self.blocks(budget, work)
            report = self.report(records, budget) | {"out": str(out), "resumed_after_blocks": before}
            if self.ranks.first:
                clear_leftovers(out)
                with staged(out, overwrite=True) as folder:
                    found = self.save(folder, records)
                    report |= told_room(folder, found, report["warnings"]) | self.watch.spent()
                    write_report(folder / "secateur", report)
                clear_leftovers(out)
        if is_offloaded(self.loaded.model):  # what it read from is gone
            return Result(load(str(out), offload="on").model, self.loaded.tokenizer, records, report)
        return Result(self.loaded.model, self.loaded.tokenizer, records, report)

    def reopened(self, out: Path, report: dict[str, Any]) -> Result[BlockRecord]:
        """What an earlier, complete run to ``out`` made."""
        loaded = open_model(out, None, "auto", self.watch, self.config.offload)
        return Result(loaded.model, loaded.tokenizer, read_records(out / "secateur"), report)

    def verify(self) -> None:
        with self.watch.stage("verify", "compare a replay of the blocks with the model"):
            self.adapter.verify(self.windows[:1, :VERIFY_TOKENS])

    def blocks(self, budget: Budget, work: Workdir | None = None) -> list[BlockRecord]:
        """Prune block by block, from where the run stands."""
        records, state = work.restore(self.adapter, budget) if work else ([], None)
        precision = resolve_precision(self.config.precision, self.config.device)
        options = RunOptions(self.config.device, self.config.batch, precision, budget, self.ranks)
        with self.watch.stage("prune", f"prune, going on after {len(records)} blocks" if records else "prune"):
            blocks = prune_blocks(
                self.adapter, self.own_windows, self.plan, self.config.method, options, state, self.config.low_rank
            )
            for finished in blocks:
                if work:
                    work.keep(self.adapter, self.plan, finished)
                records.append(finished.record)
                self.watch.progress.update(len(records), len(self.adapter.blocks), _said(finished.record))
        return records

    def save(self, folder: Path, records: list[BlockRecord]) -> Inspection:
        """Fill a directory, and what was found when it was opened again."""
        source = lasting(self.loaded.source)
        promises = promises_of(self.loaded.model, self.plan, self.inherited)
        with self.watch.stage("save"):
            save(self.loaded.model, self.loaded.tokenizer, folder)
            write_artefact(
                folder / "secateur",
                recipe=dump_recipe({"model": source, **self.config.to_dict()}),
                identity=self.identity,
                records=[record.to_dict() for record in records],
                promises=promises,
            )
        return checked(folder, self.watch)

    def report(self, records: list[BlockRecord], budget: Budget) -> dict[str, Any]:
        """All that ``report.json`` holds; seconds and memory are those of this process."""
        report = run_report(self.loaded, self.config, self.plan, self.texts, records)
        linears = [linear for record in records for linear in record.linears]
        zeros = sum(linear.sparsity * self.plan[linear.name].size for linear in linears)
        report["pattern"] = {"short": str(self.config.target), "words": self.config.words}
        report["sparsity"] = {"requested": self.plan.sparsity, "achieved": zeros / self.plan.size}
        report["blocks"] = {"pruned": sum(bool(r.linears) for r in records), "total": len(self.adapter.blocks)}
        report["low_rank"] = _low_rank(linears, self.plan, self.loaded.model.dtype)
        report["left_alone"] = self.adapter.left_alone()
        report["skipped"] = [row.to_dict() for row in self.selection.skipped]
        report["hidden_states"] = {"memory_peak": budget.peak_used, "disk_peak": budget.peak_spilled}
        return report | {"out": None, "room": None, "processes": self.ranks.size} | self.watch.spent()


def checked(
    folder: Path,
    watch: Stopwatch,
    tensors: Mapping[str, torch.Tensor] | None = None,
    check: Callable[[str, torch.Tensor], None] | None = None,
) -> Inspection:
    """What was saved, opened again; ArtefactError where it breaks a promise. The rest as ``inspect`` has it."""
    with watch.stage("inspect", "check what was saved"):
        found = inspect(folder, tensors=tensors, check=check)
    if found.broken:
        raise ArtefactError(f"the saved model breaks {len(found.broken)} promises, the first: {found.broken[0]}")
    return found


def _said(record: BlockRecord) -> str:
    error = "not pruned" if record.output_error is None else f"output error {record.output_error:.4f}"
    return f"{record.name}, {error}, {record.seconds:.1f} s"


def open_model(
    model: "Source",
    tokenizer: "PreTrainedTokenizerBase | None",
    dtype: Dtype,
    watch: Stopwatch,
    offload: Literal["auto", "on", "off"] = "off",
    codes: bool = False,
) -> Loaded:
    if isinstance(model, Loaded):
        return model
    if isinstance(model, str | os.PathLike):
        with watch.stage("load", f"load {os.fspath(model)}"):
            return load(os.fspath(model), dtype=dtype, offload=offload, codes=codes)
    if tokenizer is None:
        raise UsageError("a model given as an object needs its tokenizer; pass tokenizer=...")
    model.requires_grad_(False).eval()
    return Loaded(model, tokenizer, model.name_or_path or type(model).__name__, fingerprint(model))


def inherited_by(loaded: Loaded, plan: Plan) -> Inherited:
    """What the model's directory promises of matrices outside the plan."""
    if loaded.folder is None:
        return Inherited()
    return inherited(loaded.folder, {one.name for one in promised(loaded.model, plan)})


def windows_of(loaded: Loaded, texts: Texts, config: PruneConfig | QuantizeConfig) -> torch.Tensor:
    """The calibration: ``samples`` windows of ``seq_len`` tokens of the text."""
    check_seq_len(config.seq_len, getattr(loaded.model.config, "max_position_embeddings", None))
    tokens = tokenize(texts, loaded.tokenizer)
    return sample_windows(tokens, config.samples, config.seq_len, torch.Generator().manual_seed(config.seed))


def with_text_needed(config: Config) -> Config:
    """A method that looks at weights alone gets a few tokens of the embedded text, on which structure is observed."""
    if config.needs_text:
        return config
    return replace(config, data="embedded", samples=1, seq_len=min(config.seq_len, PROBE_TOKENS))


def select_linears(adapter: DecoderAdapter, config: PruneConfig | TrainConfig | QuantizeConfig) -> Selection:
    """What the config plans of this model; UsageError where it does not fit."""
    blocks = config.block_range(len(adapter.blocks))
    try:
        return select(adapter, config.target, blocks, config.include, config.ignore, config.taper)
    except ValueError as error:  # a width that the pattern does not divide
        raise UsageError(str(error)) from error


def select_to_prune(adapter: DecoderAdapter, config: PruneConfig) -> Selection:
    """The same, with whole FFNs where the method wants them, and room for the branches that are asked for."""
    selection = select_linears(adapter, config)
    if isinstance(config.method, SparseLLM):
        check_whole_ffns(adapter, selection.plan)
    if config.low_rank:
        check_ranks(adapter, selection.plan, config.low_rank)
    return selection


def _settled(config: PruneConfig, loaded: Loaded, device: str, total: int) -> PruneConfig:
    """The config with nothing left to circumstances: no auto, no relative path, blocks by number."""
    blocks = config.block_range(total)
    dtype, precision = str(loaded.model.dtype).removeprefix("torch."), resolve_precision(config.precision, device)
    fields = {"device": device, "dtype": dtype, "precision": precision, "blocks": f"{blocks.start}:{blocks.stop}"}
    return config_from_dict({**config.to_dict(), **fields, "data": lasting(config.data)})


def lasting(source: str) -> str:
    """A model or text that is named by a path, named so that it is found from any directory."""
    if source in BUILT_IN or source.startswith("hf:"):
        return source
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _low_rank(linears: Sequence[LinearRecord], plan: Plan, dtype: torch.dtype) -> dict[str, float] | None:
    """What the branches cost and give back; None where there are none. A number counts 16 bit in bits_per_weight."""
    branched = [(linear, linear.branch) for linear in linears if linear.branch]
    if not branched:
        return None
    numbers = sum(branch.numbers for _, branch in branched)
    kept = sum((1 - linear.sparsity) * plan[linear.name].size for linear, _ in branched)
    return {
        "rank": branched[0][1].rank,
        "branches": len(branched),
        "numbers": numbers,
        "bytes": numbers * dtype.itemsize,
        "share": numbers / max(kept, 1),
        "bits_per_weight": plan.bits_per_weight + VALUE_BITS * numbers / plan.size,
        "returned": sum(branch.returned for _, branch in branched) / len(branched),
    }


def resolve_device(device: Device) -> Literal["cpu", "cuda"]:
    """What ``auto`` means here; DeviceError where the device asked for is not."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(device)
    return device


def resolve_precision(precision: Precision, device: str) -> Literal["float32", "bfloat16"]:
    """What ``auto`` means here: bfloat16 on a device with instructions for its products, else float32."""
    if precision != "auto":
        return precision
    return "bfloat16" if _multiplies_bfloat16(device) else "float32"


def _multiplies_bfloat16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
