"""The training loop: a generator over optimizer steps, on accelerate, that draws and saves nothing.

    loop = Loop(learner, optimizer, batches, options, accelerator)
    for record in loop.run():      # whoever runs it draws the progress, keeps checkpoints, or stops
        ...
    optimizer.project()

A step takes its batch in micro batches, whose gradients add up; in several processes each takes its share of the batch,
and DDP or FSDP2 average the gradients. The rate of a step depends on its number alone. A step whose gradient is not
finite is left out and counted; past a limit the run ends.

B = rows of a batch, S = tokens of a row.
"""

import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from secateur.core.losses import Losses
from secateur.core.moments import ColumnNorms
from secateur.core.sparse_adamw import rate
from secateur.errors import NumericalError, UsageError
from secateur.training import shards
from secateur.training.batches import Batches
from secateur.training.inputs import InputSums
from secateur.training.learner import Learner
from secateur.training.optimizer import SparseAdamW


@dataclass(frozen=True)
class LoopOptions:
    """How the steps are taken; what they are is the learner's and the optimizer's."""

    steps: int
    lr: float
    """The highest rate."""
    warmup: float
    """Share of the steps in which the rate rises."""
    final_lr: float
    """Share of ``lr`` at the end."""
    clip: float
    """Largest norm of the gradient."""
    micro_batch: int
    """Rows that go through the model together."""
    tolerated: int
    """Steps that may be left out."""


@dataclass(frozen=True)
class StepRecord:
    """One step. Losses are means over the tokens of the whole batch, in nats."""

    step: int
    """From 1."""
    lr: float
    loss: float
    divergence: float
    cross_entropy: float
    grad_norm: float
    """Before it was clipped."""
    flip_rate: float
    """Share of all masks that the last refresh changed."""
    seconds: float
    skipped: bool
    """The gradient was not finite, and nothing moved."""


class Loop:
    """The state of a run between two steps. Make it, let ``checkpoint`` restore it if it goes on, then ``run`` it."""

    def __init__(
        self,
        learner: Learner,
        optimizer: SparseAdamW,
        batches: Batches,
        options: LoopOptions,
        accelerator: Accelerator,
        inputs: InputSums | None = None,
    ) -> None:
        """``inputs``: what the optimizer's metric wants to be shown, if it does."""
        self.learner, self.optimizer, self.batches, self.options = learner, optimizer, batches, options
        self.accelerator, self.inputs = accelerator, inputs
        self.wrapped: nn.Module = learner if isinstance(learner, FSDPModule) else accelerator.prepare(learner)
        self.step, self.skipped = 0, 0
        if batches.batch % accelerator.num_processes:
            raise UsageError(
                f"batch {batches.batch} does not divide over {accelerator.num_processes} processes; choose a multiple"
            )

    def run(self) -> Iterator[StepRecord]:
        """The steps that are left."""
        while self.step < self.options.steps:
            yield self._step()

    def _step(self) -> StepRecord:
        start = time.perf_counter()
        lr = rate(self.step + 1, self.options.steps, self.options.lr, self.options.warmup, self.options.final_lr)
        losses = self._gradients(self._own(self.batches.at(self.step)))
        norm = self._norm()
        finite = math.isfinite(norm) and all(map(math.isfinite, losses))
        seen = self.inputs.taken(self._total) if self.inputs else {}
        if finite:
            self._move(lr, seen)
        else:
            self._leave_out(norm)
        self.optimizer.zero_grad()
        self.step += 1
        flips, seconds = self.optimizer.flip_rate(), time.perf_counter() - start
        return StepRecord(self.step, lr, *losses, norm, flips, seconds, not finite)

    def _own(self, ids: Int[Tensor, "B S"]) -> Int[Tensor, "b S"]:
        """This process's share of a batch."""
        return ids[self.accelerator.process_index :: self.accelerator.num_processes].to(self.accelerator.device)

    def _gradients(self, ids: Int[Tensor, "b S"]) -> tuple[float, float, float]:
        """Gradients of the mean loss at the parameters; (loss, divergence, cross entropy) of all processes."""
        parts = ids.split(self.options.micro_batch)
        sums = torch.zeros(3, device=ids.device)
        for number, part in enumerate(parts, 1):
            with self._sums_up(last=number == len(parts)):
                with self.inputs.watching() if self.inputs else nullcontext():
                    losses: Losses = self.wrapped(part)
                self.accelerator.backward(losses.total * (len(part) / len(ids)))
            told = torch.stack([losses.total.detach(), losses.divergence, losses.cross_entropy])
            sums += told * (len(part) / len(ids))
        total, divergence, entropy = self.accelerator.reduce(sums, "mean").tolist()  # pyright: ignore
        return total, divergence, entropy

    def _sums_up(self, *, last: bool) -> AbstractContextManager[None]:
        """DDP averages gradients once a batch, with its last part; FSDP2 at once, or each process would hold all."""
        whole = last or isinstance(self.wrapped, FSDPModule)
        return nullcontext() if whole else self.accelerator.no_sync(self.wrapped)

    def _norm(self) -> float:
        """Of the gradient, which is cut to ``clip``."""
        norm = self.accelerator.clip_grad_norm_(self.learner.parameters(), self.options.clip)
        return float(shards.whole(norm))  # pyright: ignore[reportArgumentType]

    def _total(self, sums: Tensor) -> Tensor:
        """Over all processes, the same to the bit in each."""
        return self.accelerator.reduce(sums, "sum")  # pyright: ignore[reportReturnType]

    def _move(self, lr: float, seen: dict[Tensor, ColumnNorms]) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if seen:
            self.optimizer.observe(seen)
        self.optimizer.step()

    def _leave_out(self, norm: float) -> None:
        self.skipped += 1
        self.optimizer.zero_grad()
        self.optimizer.step()  # nothing moves, and the schedule goes on
        if self.skipped > self.options.tolerated:
            raise NumericalError(
                f"step {self.step + 1}: the gradient is not finite (norm {norm}), for the {self.skipped}th time; lower "
                "lr, or raise tolerated"
            )

    @torch.no_grad()
    def held_out(self) -> dict[str, float]:
        """Divergence and cross entropy on the windows that are never trained on. In all processes."""
        self.learner.eval()
        sums = torch.zeros(2)
        for ids in self.batches.holdout.long().split(self.options.micro_batch):
            losses = self.learner(ids.to(self.accelerator.device))
            sums += torch.stack([losses.divergence, losses.cross_entropy]).cpu() * (
                len(ids) / len(self.batches.holdout)
            )
        self.learner.train()
        shards.reshard(self.learner)
        divergence, entropy = sums.tolist()
        return {"divergence": divergence, "cross_entropy": entropy}
