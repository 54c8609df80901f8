"""One training run, from a request to a result: what is settled before the first step, the steps, the saved directory.

Nothing appears at OUT before everything in it has been opened again and checked; until then the run's last state is
kept beside it (``training.checkpoint``).
"""

import hashlib
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState

from secateur.config import dump_recipe
from secateur.core.plan import Plan
from secateur.core.sparse_adamw import NEED_INPUTS
from secateur.data.sources import Texts, read_texts
from secateur.data.tokens import check_seq_len
from secateur.errors import UsageError
from secateur.evaluation.inspect import Checkpoint, Inspection
from secateur.models.adapter import DecoderAdapter
from secateur.models.head import check_head
from secateur.models.load import Loaded
from secateur.models.promises import Inherited, read_promises
from secateur.models.quiet import quiet
from secateur.models.save import clear_leftovers, save, staged
from secateur.pruning.selection import Selection
from secateur.report.artefact import promised, promises_of, write_artefact, write_report
from secateur.report.facts import Stopwatch, versions
from secateur.report.stored_page import told_room
from secateur.runs import (
    VERIFY_TOKENS,
    Result,
    checked,
    inherited_by,
    lasting,
    open_model,
    resolve_device,
    resolve_precision,
    select_linears,
)
from secateur.teachers import Named, Tutor, tutor
from secateur.train_config import TrainConfig, train_config_from_dict
from secateur.training import shards
from secateur.training.batches import Batches, cut, windows_of_all
from secateur.training.checkpoint import Checkpoints, opened, read_steps
from secateur.training.groups import first_masks, kept_plan, parameter_groups, sparse_linears
from secateur.training.inputs import InputSums
from secateur.training.learner import Learner
from secateur.training.loop import Loop, LoopOptions, StepRecord
from secateur.training.low_rank import follow_masks, start_slorb
from secateur.training.masked_lora import merge_lora, start_lora
from secateur.training.optimizer import SparseAdamW
from secateur.training.outcome import Outset, outset, warnings
from secateur.training.tracking import checked_tracker, tracked

MACHINE = ("checkpoint", "tracker", "shard")
"""Keys of a recipe that change how machines are used, and the result by no more than the number of processes does."""
DISTRIBUTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
"""What accelerate may do with several processes: start them, and wrap the model in DDP."""
LAUNCH = Path(__file__).parent / "training" / "gpus.yaml"
"""The config for accelerate's launcher that does so."""


@dataclass(frozen=True)
class TrainRun:
    """Everything that is settled before the first step."""

    student: Loaded
    teacher: Tutor
    texts: list[Texts]
    batches: Batches
    config: TrainConfig
    """With nothing left to circumstances."""
    adapter: DecoderAdapter
    selection: Selection
    inherited: Inherited
    loop: Loop
    watch: Stopwatch

    @classmethod
    def prepare(
        cls, student: Named, teacher: Named | None, config: TrainConfig, watch: Stopwatch, logs: Path | None = None
    ) -> "TrainRun":
        """``logs``: where a tracker may write files."""
        device = resolve_device(config.device)
        precision = resolve_precision(config.precision, device)
        accelerator = accelerator_on(device, checked_tracker(config.tracker), logs)
        _check_launch(accelerator, config)
        with watch.stage("data", f"read {', '.join(config.data)}"):
            texts = [read_texts(name, "calibration") for name in config.data]
        own = open_model(student, None, config.dtype, watch)
        _check_type(own)
        other = _tutor(own, teacher, config, precision, accelerator.device, watch)
        check_seq_len(config.seq_len, getattr(own.model.config, "max_position_embeddings", None))
        with watch.stage("tokenize"):
            windows = windows_of_all(texts, own.tokenizer, config.seq_len)
        batches = cut(windows, batch=config.batch, holdout=config.holdout, seed=config.seed)
        adapter = DecoderAdapter(own.model)
        selection = select_linears(adapter, config)
        with watch.stage("verify", "compare logits made in pieces with the model's own"):
            check_head(own.model, batches.holdout[:1, :VERIFY_TOKENS].long())
        settled = _settled(config, own, device, precision, len(adapter.blocks))
        torch.manual_seed(config.seed)  # dropout, where a model has it
        rest = inherited_by(own, selection.plan) if config.lora else Inherited()
        loop = _loop(own, other, adapter, selection.plan, batches, settled, accelerator)
        return cls(own, other, texts, batches, settled, adapter, selection, rest, loop, watch)

    @property
    def plan(self) -> Plan:
        return self.selection.plan

    @property
    def cached(self) -> bool:
        """Whether the teacher answers from the disk."""
        return self.teacher.place != self.teacher.source

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the bytes: an unfinished run goes on only where all of it is the same."""
        tokens = hashlib.sha256(self.batches.windows.numpy().tobytes()).hexdigest()[:16]
        return {
            "recipe": {key: value for key, value in self.config.to_dict().items() if key not in MACHINE},
            "student": self.student.fingerprint,
            "teacher": {"model": self.teacher.fingerprint, "cached": self.cached},
            "tokens": tokens,
            "versions": versions(),
        }

    def into(self, out: Path, resume: bool) -> Result[StepRecord]:
        """Train, save, open what was saved again, check it; all or nothing at ``out``."""
        with opened(out, self.identity, resume=resume) as work:
            before = work.kept
            records, noted = self.steps(work)
            merge_lora(self.student.model)
            kept = self.kept()
            report = self.report(records, noted, kept) | {"out": str(out), "resumed_after_steps": before}
            shards.gathered(self.student.model)
            if shards.is_first():
                clear_leftovers(out)
                with staged(out, overwrite=True) as folder:
                    found = self.save(folder, records, kept)
                    report |= {"low_rank": asdict(found.low_rank) if found.low_rank else None}
                    report |= told_room(folder, found, report["warnings"]) | self.watch.spent()
                    write_report(folder / "secateur", report)
                clear_leftovers(out)
        if self.config.shard:  # what was trained lies in pieces
            return self.reopened(out, report)
        return Result(self.student.model, self.student.tokenizer, records, report)

    def reopened(self, out: Path, report: dict[str, Any]) -> Result[StepRecord]:
        """What an earlier, complete run to ``out`` made."""
        loaded = open_model(str(out), None, "auto", self.watch)
        return Result(loaded.model, loaded.tokenizer, read_steps(out / "secateur" / "records.jsonl"), report)

    def steps(self, work: Checkpoints) -> tuple[list[StepRecord], dict[str, Any]]:
        """Train from where the run stands; every step's record, and the loss on held-out windows before and after."""
        config, progress = self.config, self.watch.progress
        records, noted = work.restore(self.loop)
        if not noted:
            with self.watch.stage("held out", "loss on held-out windows, before"):
                noted = {"before": self.loop.held_out(), "outset": asdict(outset(self.loop.optimizer))}
        with (
            self.watch.stage("train", f"train, going on after step {len(records)}" if records else "train"),
            self.tracked() as tell,
        ):
            for record in self.loop.run():
                records.append(record)
                tell(record)
                if record.step % config.checkpoint == 0 and record.step < config.steps:
                    work.keep(self.loop, records, noted)
                progress.update(record.step, config.steps, _said(record))
            self.loop.optimizer.project()
        with self.watch.stage("held out", "loss on held-out windows, after"):
            noted |= {"after": self.loop.held_out()}
        return records, noted

    def tracked(self) -> AbstractContextManager[Callable[[StepRecord], None]]:
        return tracked(self.loop.accelerator, self.config.to_dict())

    def kept(self) -> Plan:
        """What the trained weights will be held to. In all processes."""
        if self.config.lora:
            return self.plan
        promised = self.loop.optimizer.promised()
        return kept_plan(self.adapter, self.plan, promised) if promised else Plan({})

    def save(self, folder: Path, records: list[StepRecord], kept: Plan) -> Inspection:
        """Fill a directory, and what was found when it was opened again."""
        model = self.student.model
        promises = promises_of(model, kept, self.inherited, kept.zeros if self.config.scope == "global" else None)
        with self.watch.stage("save"):
            model.requires_grad_(False).eval()
            save(model, self.student.tokenizer, folder)
            promises |= {"changed": [] if self.config.lora else [*Checkpoint(folder)]}
            sources = {"student": lasting(self.student.source), "teacher": lasting(self.teacher.place)}
            write_artefact(
                folder / "secateur",
                recipe=dump_recipe({**sources, **self.config.to_dict()}),
                identity=self.identity,
                records=[asdict(record) for record in records],
                promises=promises,
            )
        return checked(folder, self.watch)

    def given_up(self) -> list[str]:
        """A line where matrices that the student's directory promises sparse are trained as dense ones."""
        folder = self.student.folder
        promises = read_promises(folder) if folder and not self.config.lora else None
        own = {one.name for one in promised(self.student.model, self.plan)}
        names = [one.name for one in promises.linears if one.name not in own] if promises else []
        if not names:
            return []
        return [
            f"{len(names)} matrices that {self.student.source} promises sparse were outside the plan and trained "
            f"dense, the first {names[0]}: their zeros are gone; include them, or train with lora"
        ]

    def report(self, records: list[StepRecord], noted: dict[str, Any], kept: Plan) -> dict[str, Any]:
        """All that ``report.json`` holds; seconds and memory are those of this process."""
        config, seconds = self.config, [record.seconds for record in records]
        return {
            "student": {"source": self.student.source, "class": type(self.student.model).__name__},
            "teacher": {"source": self.teacher.source, "cached": self.cached},
            "recipe": config.to_dict(),
            "pattern": {"short": str(config.target), "words": config.words},
            "sparsity": kept.sparsity,
            "linears": len(kept),
            "weights": kept.size,
            "skipped": [row.to_dict() for row in self.selection.skipped],
            "processes": self.loop.accelerator.num_processes,
            "steps": config.steps,
            "tokens": config.steps * config.step_tokens,
            "epochs": self.batches.epochs(config.steps),
            "tokens_per_second": config.step_tokens / statistics.median(seconds),
            "held_out": {"before": noted["before"], "after": noted["after"]},
            "flip_rate": records[-1].flip_rate,
            "skipped_steps": self.loop.skipped,
            "data": [{**text.provenance, "name": text.name} for text in self.texts],
            "warnings": warnings(
                config.method, records, Outset(**noted["outset"]), self.student.model.dtype, self.loop.skipped
            )
            + self.given_up(),
            "low_rank": None,
            "room": None,
            "versions": versions(),
        } | self.watch.spent()


def _said(record: StepRecord) -> str:
    loss = "left out, not finite" if record.skipped else f"divergence {record.divergence:.3f}"
    return f"{loss}, text {record.cross_entropy:.3f}, masks moved {record.flip_rate:.2e}"


def _settled(config: TrainConfig, student: Loaded, device: str, precision: str, total: int) -> TrainConfig:
    """The config with nothing left to circumstances."""
    blocks = config.block_range(total)
    fields = {
        "device": device,
        "dtype": str(student.model.dtype).removeprefix("torch."),
        "precision": precision,
        "blocks": f"{blocks.start}:{blocks.stop}",
        "data": [lasting(name) for name in config.data],
        "scales": config.row_scales,
    }
    return train_config_from_dict({**config.to_dict(), **fields})


def _check_type(student: Loaded) -> None:
    if student.model.dtype == torch.float16:
        raise UsageError(
            f"{student.source} is in float16, whose smallest steps are larger than many a gradient; train it with "
            "--set dtype=bfloat16 or dtype=float32"
        )


def _tutor(
    student: Loaded,
    teacher: Named | None,
    config: TrainConfig,
    precision: Literal["float32", "bfloat16"],
    device: torch.device,
    watch: Stopwatch,
) -> Tutor:
    """On the student's device, dealt out as the student is; or whole on another."""
    if config.teacher_device == "auto":
        return tutor(student, teacher, config.loss, precision, device, watch, shard=config.shard)
    elsewhere = torch.device(resolve_device(config.teacher_device))
    return tutor(student, teacher, config.loss, precision, elsewhere, watch)


def _loop(
    student: Loaded,
    teacher: Tutor,
    adapter: DecoderAdapter,
    plan: Plan,
    batches: Batches,
    config: TrainConfig,
    accelerator: Accelerator,
) -> Loop:
    model = student.model.requires_grad_(True).train()
    if not config.shard:
        model.to(accelerator.device)
    if config.slorb:
        start_slorb(model, first_masks(adapter, plan), config.slorb, train_X=config.slorb_train_X)
    generator, lora = torch.Generator().manual_seed(config.seed), []
    if config.lora:
        lora = start_lora(model, first_masks(adapter, plan), config.lora, config.lora_scale, generator)
    if config.gradient_checkpointing:
        with quiet():  # newer transformers have another name for it and say so
            model.gradient_checkpointing_enable({"use_reentrant": False})
    autocast = torch.bfloat16 if config.precision == "bfloat16" else None
    learner = Learner(model, teacher.ask, config.loss, autocast)
    if config.shard:
        shards.spread(learner, adapter.blocks, accelerator.device)
    optimizer = SparseAdamW(
        [{"params": lora}] if lora else parameter_groups(adapter, plan),
        schedule=config.schedule(),
        method=config.method,
        decay=config.pull,
        metric=config.metric,
        scope=config.scope,
        scales=config.row_scales,
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    if config.slorb_follow:
        follow_masks(optimizer, model)
    options = LoopOptions(
        config.steps, config.lr, config.warmup, config.final_lr, config.clip, config.micro_batch, config.tolerated
    )
    inputs = InputSums(sparse_linears(adapter, plan)) if config.metric in NEED_INPUTS and not lora else None
    return Loop(learner, optimizer, batches, options, accelerator, inputs)


def accelerator_on(device: Literal["cpu", "cuda"], tracker: str | None, logs: Path | None) -> Accelerator:
    """On this device, whatever an earlier accelerator of this process was on: their state is one, and it keeps that."""
    place = PartialState(cpu=device == "cpu").device
    if place is None or place.type != device:
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=device == "cpu", mixed_precision="no", log_with=tracker, project_dir=logs)


def _check_launch(accelerator: Accelerator, config: TrainConfig) -> None:
    if config.shard and accelerator.num_processes == 1:
        raise UsageError("shard deals a model out to several processes and this is one; start it with torchrun")
    if accelerator.distributed_type not in DISTRIBUTED:
        raise UsageError(
            f"accelerate was told to use {accelerator.distributed_type.value}; it would replace the optimizer's "
            f"parameters: launch with --config_file {LAUNCH}, or torchrun, and --set shard=true"
        )
