"""One quantize run, from a request to a result: settled before the first block, the blocks, the saved directory.

It is a prune run with another solver: blocks one at a time, true moments of their inputs, finished blocks beside OUT
until everything in it has been opened again and checked. What is checked is more: every weight must come back from its
code exactly, and no zero of the source may be lost.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from secateur.balancing import Searched, Smooth, balance_block
from secateur.config import dump_recipe
from secateur.core.grid import Scheme
from secateur.core.packing import from_bits, to_bits
from secateur.core.pattern import NM, Pattern, Unstructured, check_mask
from secateur.core.plan import Plan, Target
from secateur.data.sources import Texts, read_texts
from secateur.errors import ArtefactError, UsageError
from secateur.evaluation.inspect import Checkpoint, Inspection
from secateur.export.directory import file_bytes, stored_sizes
from secateur.models.adapter import DecoderAdapter
from secateur.models.branches import attached
from secateur.models.grids import check_carriers, divisions, note_input
from secateur.models.load import Loaded
from secateur.models.offload import moved
from secateur.models.promises import Inherited, read_promises
from secateur.models.save import clear_leftovers, staged
from secateur.pruning.oneshot import Beside, BlockRecord, RunOptions, prune_blocks
from secateur.pruning.selection import Selection
from secateur.pruning.work import Watcher, Work
from secateur.pruning.workdir import Workdir, opened
from secateur.quantization.accounting import storage_of
from secateur.quantization.compressed import Dequantized, library, write
from secateur.quantize_config import GROUPS, QuantizeConfig, fitting_group, quantize_config_from_dict
from secateur.report.artefact import promises_of, read_records, write_artefact, write_report
from secateur.report.facts import Stopwatch, versions
from secateur.report.quantize_page import alternatives, storage_warnings
from secateur.report.run_report import run_report
from secateur.runs import (
    MACHINE,
    VERIFY_TOKENS,
    Result,
    checked,
    inherited_by,
    lasting,
    open_model,
    resolve_device,
    resolve_precision,
    select_linears,
    windows_of,
    with_text_needed,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from secateur.runs import Source


@dataclass(frozen=True)
class QuantizeRun:
    """Everything that is settled before the first block."""

    loaded: Loaded
    adapter: DecoderAdapter
    texts: Texts
    windows: Tensor
    config: QuantizeConfig
    """With nothing left to circumstances."""
    scheme: Scheme
    selection: Selection
    """Each linear with the pattern that its zeros follow, or are to follow."""
    kept: dict[str, Tensor]
    """Bit i of a linear's entry: element i of its weight was not zero."""
    inherited: Inherited
    watch: Stopwatch

    @classmethod
    def prepare(
        cls, model: "Source", tokenizer: "PreTrainedTokenizerBase | None", config: QuantizeConfig, watch: Stopwatch
    ) -> "QuantizeRun":
        library()
        config, device = with_text_needed(config), resolve_device(config.device)
        with watch.stage("data", f"read {config.data}"):
            texts = read_texts(config.data, "calibration")
        loaded = open_model(model, tokenizer, config.dtype, watch)
        if found := attached(loaded.model):
            raise UsageError(
                f"{loaded.source} has low-rank branches beside {len(found)} linears, which a quantized directory has "
                "no place for; quantize a model without them"
            )
        windows = windows_of(loaded, texts, config)
        adapter = DecoderAdapter(loaded.model)
        selection = select_linears(adapter, config)
        linears = linears_of(adapter, selection.plan)
        check_carriers(linears)
        settled = _settled(config, loaded, device, len(adapter.blocks), selection.plan)
        scheme = settled.scheme(settled.group_size, _scales(loaded.model.dtype))
        _check_widths(selection.plan, scheme)
        kept = {name: to_bits((linear.weight != 0).flatten()).cpu() for name, linear in linears.items()}
        held = dict(_as_it_is(selection.plan, linears, loaded.folder))
        joint = {name: _reached(target, held[name]) for name, target in selection.plan.items()}
        selection = replace(selection, plan=Plan(joint if config.method == "joint" else held))
        rest = inherited_by(loaded, selection.plan)
        return cls(loaded, adapter, texts, windows, settled, scheme, selection, kept, rest, watch)

    @property
    def plan(self) -> Plan:
        return self.selection.plan

    @property
    def linears(self) -> dict[str, nn.Linear]:
        """All that is quantized, by full name."""
        return linears_of(self.adapter, self.plan)

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the bytes: an unfinished run goes on only where all of it is the same."""
        return {
            "recipe": {key: value for key, value in self.config.to_dict().items() if key not in MACHINE},
            "model": self.loaded.fingerprint,
            "tokens": hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()[:16],
            "versions": {**versions(), "compressed-tensors": library().__version__},
        }

    def into(self, out: Path, resume: bool) -> Result[BlockRecord]:
        """Quantize, save, open what was saved again, check it; all or nothing at ``out``."""
        with moved(self.loaded.model, "cpu"), opened(out, self.identity, resume=resume) as work:
            with self.watch.stage("verify", "compare a replay of the blocks with the model"):
                self.adapter.verify(self.windows[:1, :VERIFY_TOKENS])
            before = work.kept
            records = self.blocks(work)
            clear_leftovers(out)
            with staged(out, overwrite=True) as folder:
                stored, found = self.save(folder, records)
                zeros = {row.name: (row.zeros, row.promised) for row in found.rows}
                report = self.report(
                    records, storage_of(stored, zeros, stored_sizes(folder), file_bytes(folder)).to_dict()
                )
                report |= {"out": str(out), "resumed_after_blocks": before} | self.watch.spent()
                write_report(folder / "secateur", report)
            clear_leftovers(out)
        return Result(self.loaded.model, self.loaded.tokenizer, records, report)

    def reopened(self, out: Path, report: dict[str, Any]) -> Result[BlockRecord]:
        """What an earlier, complete run to ``out`` made."""
        loaded = open_model(str(out), None, "auto", self.watch, codes=True)
        return Result(loaded.model, loaded.tokenizer, read_records(out / "secateur"), report)

    def blocks(self, work: Workdir) -> list[BlockRecord]:
        """Quantize block by block, from where the run stands."""
        config, budget = self.config, work.budget(int(self.config.hidden_memory * 1e9))
        records, state = work.restore(self.adapter, budget)
        precision = resolve_precision(config.precision, config.device)
        options = RunOptions(config.device, config.batch, precision, budget)
        method = config.quantizer(self.scheme)
        with self.watch.stage("quantize", f"quantize, going on after {len(records)} blocks" if records else "quantize"):
            for finished in prune_blocks(
                self.adapter, self.windows, self.plan, method, options, state, beside=self.beside()
            ):
                work.keep(self.adapter, self.plan, finished)
                records.append(finished.record)
                said = f"{finished.record.name}, {finished.record.seconds:.1f} s"
                self.watch.progress.update(len(records), len(self.adapter.blocks), said)
        return records

    def beside(self) -> Beside | None:
        """What else happens to a block: balanced before its solves, its inputs watched behind them."""
        beside = Beside()
        if self.config.balance != "none":
            weighted = self.config.method != "rtn"
            smooth = self.config.balance == "smooth"
            balance = Smooth(self.config.strength) if smooth else Searched(self.scheme, weighted)
            beside = beside._replace(before=partial(balance_block, balance))
        if self.config.activations == "static":
            beside = beside._replace(watch=watch_inputs)
        return None if beside == Beside() else beside

    def save(self, folder: Path, records: list[BlockRecord]) -> tuple[Dequantized, Inspection]:
        """Fill a directory, and what was found when it was opened again."""
        loaded, linears = self.loaded, self.linears
        divided = {place: loaded.model.get_submodule(place) for place in divisions(loaded.model)}
        changed = [f"{place}.{name}" for place, module in divided.items() for name, _ in module.named_parameters()]
        promises = promises_of(loaded.model, self.plan, self.inherited, self.zeros) | {"changed": changed}
        with self.watch.stage("save"):
            write(loaded.model, loaded.tokenizer, folder, linears, self.scheme, self.config.activations)
            write_artefact(
                folder / "secateur",
                recipe=dump_recipe({"model": lasting(loaded.source), **self.config.to_dict()}),
                identity=self.identity,
                records=[record.to_dict() for record in records],
                promises=promises,
            )
        stored = Dequantized(folder, Checkpoint(folder))

        def check(tensor: str, W: Tensor) -> None:
            name = tensor.removesuffix(".weight")
            if name in linears:
                check_returned(name, W, linears[name].weight, self.kept[name])

        return stored, checked(folder, self.watch, stored, check)

    @property
    def zeros(self) -> int:
        """That will be there at least, in what is quantized."""
        if self.config.method == "joint":
            return self.plan.zeros
        return sum(self.plan[name].size - int(bits_set(bits)) for name, bits in self.kept.items())

    def report(self, records: list[BlockRecord], storage: dict[str, Any]) -> dict[str, Any]:
        """All that ``report.json`` holds but what the run itself took."""
        report = run_report(self.loaded, self.config, self.plan, self.texts, records)
        others = alternatives(storage)
        return {
            **report,
            "scheme": self.scheme.words(),
            "patterns": sorted({str(target.pattern) for target in self.plan.values()}),
            "balance": {
                "folded": len(divisions(self.loaded.model)),
                "refused": [place for record in records for place in record.refused],
            },
            "zeros": {"before": self.plan.size - sum(map(bits_set, self.kept.values())), "after": storage["zeros"]},
            "storage": storage,
            "alternatives": others,
            "blocks": {"quantized": sum(bool(r.linears) for r in records), "total": len(self.adapter.blocks)},
            "skipped": [row.to_dict() for row in self.selection.skipped],
            "warnings": [*storage_warnings(storage, others), *report["warnings"]],
        }


def linears_of(adapter: DecoderAdapter, plan: Iterable[str]) -> dict[str, Any]:
    """The planned linears of all blocks by full name."""
    planned = set(plan)
    pairs = zip(adapter.block_names, adapter.blocks, strict=True)
    found = {f"{name}.{inner}": linear for name, block in pairs for inner, linear in adapter.linears(block).items()}
    return {name: linear for name, linear in found.items() if name in planned}


def watch_inputs(work: Work) -> dict[nn.Module, Watcher]:
    """Who widens the range of each planned linear's inputs."""
    watched: dict[nn.Module, Watcher] = {}
    for name in work.targets:
        linear: Any = work.linear(name)
        watched[linear] = partial(note_input, linear)
    return watched


def bits_set(bits: Tensor) -> int:
    return int(torch.tensor([bin(byte).count("1") for byte in range(256)])[bits.int()].sum())


def check_returned(name: str, W: Tensor, made: Tensor, kept: Tensor) -> None:
    """ArtefactError unless a weight came back from its codes exactly, every zero of the source still zero."""
    lost = int(((W != 0).flatten() & ~from_bits(kept, W.numel())).sum())
    if lost:
        raise ArtefactError(f"{lost} zeros of {name} were lost; nothing was saved, please report this")
    if not torch.equal(W.to(made.dtype), made.detach().cpu()):
        raise ArtefactError(
            f"{name} does not come back from its codes as it was; nothing was saved, please report this"
        )


def _settled(config: QuantizeConfig, loaded: Loaded, device: str, total: int, plan: Plan) -> QuantizeConfig:
    """The config with nothing left to circumstances."""
    blocks = config.block_range(total)
    fields = {
        "device": device,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "precision": resolve_precision(config.precision, device),
        "blocks": f"{blocks.start}:{blocks.stop}",
        "data": lasting(config.data),
        "group_size": group_size(config, plan),
    }
    return quantize_config_from_dict({**config.to_dict(), **fields})


def group_size(config: QuantizeConfig, plan: Plan) -> int | str:
    """What ``auto`` means for these linears."""
    if config.group_size != "auto":
        return config.group_size
    if config.bits == 8:
        return "channel"
    if size := fitting_group(plan.inputs):
        return size
    name, target = next((n, t) for n, t in plan.items() if t.shape[1] % GROUPS[-1])
    raise UsageError(
        f"no group size of {', '.join(map(str, GROUPS))} divides the {target.shape[1]} inputs of {name}; use "
        "--group-size channel, or ignore it"
    )


def _check_widths(plan: Plan, scheme: Scheme) -> None:
    for name, target in plan.items():
        try:
            scheme.check(target.shape[1])
        except ValueError as error:
            raise UsageError(f"{name}: {error}") from error


def _scales(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32


def _as_it_is(plan: Plan, linears: Mapping[str, nn.Linear], folder: Path | None) -> Iterable[tuple[str, Target]]:
    """Each linear with the pattern that its directory promises, or that its zeros are seen to follow."""
    promises = read_promises(folder) if folder else None
    promised = {one.name.removesuffix(".weight"): one.pattern for one in promises.linears} if promises else {}
    for name, target in plan.items():
        yield name, Target(target.shape, promised.get(name) or pattern_seen(linears[name].weight))


def _reached(asked: Target, held: Target) -> Target:
    """What the joint sweep, before which a matrix's zeros go first, ends with: N:M of as many zeros as were asked for
    stays N:M."""
    stays = isinstance(asked.pattern, Unstructured) and isinstance(held.pattern, NM)
    return held if stays and held.pattern.sparsity >= asked.pattern.sparsity else asked


def pattern_seen(W: Tensor) -> Pattern:
    """2:4 where all of a matrix is, else the share of zeros that it has."""
    mask = W != 0
    two_four = NM(2, 4)
    if W.shape[1] % 4 == 0 and not mask.all() and check_mask(mask, two_four) is None:
        return two_four
    return Unstructured(1 - float(mask.double().mean()))
