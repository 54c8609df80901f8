"""One block on its way through a pruning method: its rows of hidden states, its calls, its linears.

Hidden states wait in chunks of ``batch`` rows (``pruning.hidden``); the block is on the accelerator while it is worked
on, and a chunk visits it. Forwards and Gram products run at ``RunOptions.precision``; solves always run in float32.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.core.pattern import Pattern, Stacked
from secateur.core.plan import Target
from secateur.core.solver import LayerSolver, Needs, Pruned, relative_error
from secateur.errors import ModelError
from secateur.models.adapter import Call, DecoderAdapter, Linear
from secateur.models.layout import FeedForwardForm, Layout, observe
from secateur.pruning.hidden import Budget, Hidden
from secateur.pruning.records import LinearRecord

PROBE_TOKENS = 64
"""Tokens on which the structure of a block is observed."""
Watcher = Callable[[Tensor], None]


@dataclass(frozen=True)
class RunOptions:
    """How a run uses the machine; nothing here changes what is asked for."""

    device: str = "cpu"
    """Where blocks are worked on."""
    batch: int = 1
    """Rows of a chunk."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of forwards and Grams. "bfloat16" runs forwards under autocast and rounds the inputs of other float32 products
    to 16 bit, adding up in float32: 2 to 4 times faster on processors with AMX or AVX512-BF16. Solves stay float32."""
    budget: Budget = field(default_factory=Budget)
    """Host memory of waiting hidden states."""


@dataclass
class Work:
    """A block, what it is called with, and what is to become of it."""

    adapter: DecoderAdapter
    index: int
    hidden: Hidden
    targets: dict[str, Target]
    """Planned linears by their name inside the block."""
    options: RunOptions
    dropped: int = 0
    """Rows that turned non-finite in this block and are no longer in ``hidden``."""
    seconds: dict[str, float] = field(default_factory=dict)
    records: dict[str, LinearRecord] = field(default_factory=dict)
    """By full name; the last solve of a linear is the one on record."""

    @cached_property
    def layout(self) -> Layout:
        """The structure of the block, observed on the first tokens of a row; ask before anything is written."""
        row = next((row for rows in self.hidden for row in rows if torch.isfinite(row).all()), self.hidden[0][0])
        probe = row[None, :PROBE_TOKENS].to(self.options.device)
        return observe(self.adapter, self.index, probe, self.call(probe))

    @property
    def form(self) -> FeedForwardForm:
        """The form of the block's FFN; ModelError where SparseLLM knows none or the plan lacks a part."""
        form, name = self.layout.ffn, self.adapter.block_names[self.index]
        if form is None:
            raise ModelError(f"{name}: {self.layout.ffn_refusal}; prune it with a layer solver such as admm instead")
        wanted = {half.linear for half in (form.gate, form.up) if half} | {form.down}
        if missing := wanted - self.targets.keys():
            lacking = ", ".join(sorted(missing))
            raise ModelError(
                f"{name}: SparseLLM prunes an FFN as a whole, but the plan lacks {lacking}; let include and ignore "
                "keep all of it, or choose a layer solver such as admm"
            )
        return form

    @property
    def block(self) -> nn.Module:
        return self.adapter.blocks[self.index]

    def linear(self, name: str) -> Linear:
        linear = self.block.get_submodule(name)
        assert isinstance(linear, Linear)
        return linear

    def call(self, rows: Float[Tensor, "B S D"]) -> Call:
        return self.adapter.calls(rows.shape[0], rows.shape[1])[self.index].to(self.options.device)

    def run(self, rows: Float[Tensor, "B S D"], block: nn.Module | None = None) -> Float[Tensor, "B S D"]:
        """Output of the block (or of another copy of it) for one chunk, back in host memory."""
        rows = rows.to(self.options.device)
        rounded = self.options.precision == "bfloat16" and rows.dtype == torch.float32
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=rounded):
            return self.adapter.replay(block or self.block, rows, self.call(rows)).to("cpu", rows.dtype)

    def waiting(self, rows: Iterable[Tensor] = ()) -> Hidden:
        """A place for hidden states."""
        return Hidden(self.options.budget, rows)

    def watched_pass(self, watchers: dict[nn.Module, Watcher], block: nn.Module | None = None) -> Hidden:
        """Outputs of the block for all rows; each watcher gets its module's inputs.

        Rows whose output is not finite are dropped from ``hidden`` first, so that no watcher ever sees them.
        """
        kept, outputs = self.waiting(), self.waiting()
        for index, rows in enumerate(self.hidden):
            seen: dict[nn.Module, Tensor] = {}
            with watching({module: partial(seen.__setitem__, module) for module in watchers}):
                out = self.run(rows, block)
            finite = torch.isfinite(out).flatten(1).all(dim=1)
            if finite.all():
                kept.share(self.hidden, index)
                outputs.append(out)
            elif finite.any():
                kept.append(rows[finite])
                outputs.append(out[finite])
            if finite.any():
                for module, watcher in watchers.items():
                    inputs = seen[module].view(len(rows), -1, seen[module].shape[-1])
                    watcher(inputs if finite.all() else inputs[finite.to(inputs.device)])
        self.dropped += sum(map(len, self.hidden)) - sum(map(len, kept))
        self.hidden = kept
        return outputs

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the seconds of what happens inside to the stage's account."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def forwards(self, name: str = "forward") -> Iterator[None]:
        """A stage of forwards and moments: products at the run's precision, no autograd."""
        with products(self.options.precision), self.stage(name), torch.no_grad():
            yield

    def solved(self, linears: tuple[str, ...], before: Tensor, after: Pruned, H: Tensor | None) -> None:
        """Write stacked solved weights back into their linears and keep a record of each."""
        sizes = [self.targets[name].shape[0] for name in linears]
        for name, W0, W in zip(linears, before.split(sizes), after.W.split(sizes), strict=True):
            linear = self.linear(name)
            self.adapter.write(linear, W)
            written = self.adapter.read(linear)
            target = self.targets[name]
            full_name = f"{self.adapter.block_names[self.index]}.{name}"
            self.records[full_name] = LinearRecord(
                name=full_name,
                shape=target.shape,
                pattern=str(target.pattern),
                sparsity=float((written == 0).double().mean()),
                relative_error=None if H is None else relative_error(W0, written, H),
                note=after.note,
            )

    def stacked(self, linears: tuple[str, ...]) -> tuple[Float[Tensor, "R C"], Stacked]:
        """Weights and patterns of linears that share their input."""
        W = torch.cat([self.adapter.read(self.linear(name)) for name in linears])
        return W, Stacked(tuple((self.targets[name].shape[0], self.targets[name].pattern) for name in linears))


@contextmanager
def products(precision: Literal["float32", "bfloat16"]) -> Iterator[None]:
    """Products inside float32 matrix multiplications, from here to the end of the with-block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if precision == "bfloat16" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Precise:
    """A layer solver that computes in full float32 wherever it is called from, its time accounted for."""

    needs: ClassVar[Needs] = "gram"

    def __init__(self, solver: LayerSolver, work: "Work") -> None:
        self._solver, self._work = solver, work

    def solve(self, W: Float[Tensor, "R C"], H: Float[Tensor, "..."], pattern: Pattern | Stacked) -> Pruned:
        with products("float32"), self._work.stage("solve"):
            return self._solver.solve(W, H, pattern)


@contextmanager
def watching(inputs: dict[nn.Module, Watcher]) -> Iterator[None]:
    """Hand every input of these modules to their watcher."""

    def hook(watcher: Watcher) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            with torch.autocast(args[0].device.type, enabled=False):  # inside it, float32 products run in 16 bit
                watcher(args[0])

        return see

    handles = [module.register_forward_pre_hook(hook(watcher)) for module, watcher in inputs.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
